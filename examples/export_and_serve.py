"""A trained model as a program that needs torch alone, and a server that answers with predictions.

    python examples/export_and_serve.py [--port 8080] [--checkpoint runs/quickstart/<date-time>/final.ckpt --method FedAMM]

trains for a few seconds or takes the checkpoint of a run on images, exports the model with its normalisation (`torch.export`),
loads it as another program would, and asks the server once; without ``--port`` it ends there. An ONNX file is made the same way:
``torch.onnx.export(deployed, (example,), "model.onnx", dynamo=True)``.
"""

import argparse
import json
import tempfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import torch
from torch import Tensor, nn

from fedamm_pl import FederatedDataModule, FederatedModule, Orchestrator, algorithms


class Deployed(nn.Module):
    """Maps uint8 images, shape (B, C, H, W), to probabilities, as ``predict_step`` of the module does."""

    def __init__(self, module: FederatedModule) -> None:
        super().__init__()
        self.model = module.model.eval()
        self.register_buffer("mean", torch.tensor(module.info["mean"]).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(module.info["std"]).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise, and return probabilities, shape (B, classes)."""
        return self.model((images.float() / 255 - self.mean) / self.std).softmax(-1)


def trained() -> tuple[FederatedModule, FederatedDataModule]:
    """Train a small model for a few seconds; about three of four predictions are correct."""
    data = FederatedDataModule(
        "fashion_mnist_mini", num_clients=4, partition="iid", imbalance_factor=1.0, batch_size=32
    )
    module = algorithms.FedAvg(data.num_classes, data.in_channels, "small_cnn", lr=0.1, info=data.info)
    Orchestrator(module, data, num_rounds=4, client_fraction=1.0, local_epochs=2, eval_interval=4).run()
    return module.cpu(), data


def stored(checkpoint: Path, method: str) -> FederatedModule:
    """Load the module of a run."""
    module: FederatedModule = getattr(algorithms, method).load_from_checkpoint(checkpoint, map_location="cpu")
    return module


def serve(program: nn.Module, shape: tuple[int, ...], class_names: list[str], port: int) -> HTTPServer:
    """Return a local server that takes an image (C, H, W) as JSON and replies with its class and the probability."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                image = torch.tensor(content, dtype=torch.uint8).reshape(1, *shape)
            except (TypeError, ValueError, RuntimeError) as error:
                self.send_error(400, str(error))
                return
            with torch.no_grad():
                probability, place = program(image.expand(2, -1, -1, -1))[0].max(0)
            answer = json.dumps({"class": class_names[place], "probability": round(float(probability), 4)}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Do not log requests."""

    return HTTPServer(("127.0.0.1", port), Answers)


def main(port: int | None = None, checkpoint: Path | None = None, method: str = "FedAMM") -> dict[str, object]:
    """Train or load a model, export and serve it, ask the server once, and return the answer."""
    if checkpoint:
        module = stored(checkpoint, method)
        data = FederatedDataModule("fashion_mnist_mini")
    else:
        module, data = trained()
    names, shape = module.info["class_names"], (module.hparams["in_channels"], *module.info["image_size"])
    example, shows = data.images.test_images[:8].cpu(), data.info["class_names"][int(data.images.test_labels[0])]
    if tuple(example.shape[1:]) != shape:  # the model takes other images
        example, shows = torch.randint(256, (8, *shape), dtype=torch.uint8), "noise"
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "model.pt2"
        batch = torch.export.Dim("batch", min=2)
        torch.export.save(torch.export.export(Deployed(module), (example,), dynamic_shapes=[{0: batch}]), file)
        program = torch.export.load(file).module()  # another program needs only this file
        expected = torch.as_tensor(module.eval().predict_step(example))
        torch.testing.assert_close(program(example), expected, rtol=1e-4, atol=1e-5)
    server = serve(program, shape, names, port or 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    image = json.dumps(example[0].flatten().tolist()).encode()
    with urllib.request.urlopen(urllib.request.Request(address, image)) as reply:
        answer: dict[str, object] = json.load(reply)
    print(f"{address} answers {answer}; the image shows {shows}")
    if port is not None:
        thread.join()  # until Ctrl-C
    server.shutdown()
    server.server_close()
    return answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int)
    parser.add_argument(
        "--checkpoint", type=Path, help="final.ckpt of a run on images; without it a small model is trained"
    )
    parser.add_argument("--method", default="FedAMM", help="the run's method, as --algorithm has it")
    main(**vars(parser.parse_args()))

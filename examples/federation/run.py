"""A federation on this machine: a server and its clients, each a process of its own, on the loopback interface.

    python examples/federation/run.py [--clients 4] [--rounds 3] [--folder runs/federation] [--secure]

starts Flower's SuperLink and a SuperNode for each client, has them run the app beside this file, and ends them. With ``--secure`` the
connections are encrypted, and each client must show a key that the server knows: certificate and keys are made for the trial.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from certificate import make_certificate, make_key, run  # noqa: E402  beside this file

REPOSITORY = HERE.parents[1]
STARTING = 120.0
"""Seconds to wait until Flower has started."""


class LocalFederation:
    """The processes of Flower on this machine, as a context manager that ends them.

    Args:
        folder: Folder for Flower's files, logs, certificate and keys.
        secure: Whether connections are encrypted and nodes authenticate with a key.
        app: The app to run.
    """

    def __init__(self, folder: Path, secure: bool = False, app: Path = HERE / "app") -> None:
        self.folder, self.secure, self.app = folder.resolve(), secure, app
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        quiet |= {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self.environment = {**os.environ, **quiet, "FLWR_HOME": str(self.folder / "flower"), "PYTHONPATH": path}
        self.environment |= {"PATH": programs, "PYTHONUNBUFFERED": "1"}
        self.environment.setdefault("OMP_NUM_THREADS", "1")

    def __enter__(self) -> "LocalFederation":
        """Start the server."""
        home = self.folder / "flower"
        home.mkdir(parents=True, exist_ok=True)
        options = ["--insecure"]
        connection = "insecure = true"
        if self.secure:
            if not (self.folder / "server.crt").exists():
                make_certificate(self.folder, ["127.0.0.1", "localhost"])
            names = {"ssl-ca-certfile": "ca.crt", "ssl-certfile": "server.crt", "ssl-keyfile": "server.key"}
            options = [word for name, file in names.items() for word in (f"--{name}", str(self.folder / file))]
            options.append("--enable-supernode-auth")
            connection = f'root-certificates = "{self.folder / "ca.crt"}"'
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n{connection}\n'
        )
        try:
            self.start("server", "flower-superlink", *options, "--host", "127.0.0.1", "--port", str(self.port))
            self._wait_for_server()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes."""
        self.stop()

    def start(self, name: str, *command: str) -> None:
        """Start a process in a new process group; its output goes to ``<folder>/<name>.log``."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment, start_new_session=True
            )

    def start_client(self, number: int, **told: Any) -> None:
        """Start the node of a client.

        Args:
            number: Number of the node.
            told: Settings for ``--node-config``.
        """
        options = ["--insecure"]
        if self.secure:
            key = self.folder / f"client_{number}.key"
            if not key.exists():
                make_key(key)
                self.flwr("supernode", "register", f"{key}.pub", "here")
            options = ["--root-certificates", str(self.folder / "ca.crt"), "--auth-supernode-private-key", str(key)]
        config = " ".join(f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in told.items())
        address = ["--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1", "--port", str(free_port())]
        self.start(f"client_{number}", "flower-supernode", *options, *address, "--node-config", config)

    def submit(self, **told: Any) -> int:
        """Start a run of the app.

        Args:
            told: Settings for ``--run-config``.

        Returns:
            Flower's id of the run.
        """
        words = " ".join(f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in told.items())
        return int(
            json.loads(self.flwr("run", str(self.app), "here", "--run-config", words, "--format", "json"))["run-id"]
        )

    def status(self, run_id: int) -> dict[str, Any]:
        """Return Flower's record of a run: ``status``, and the bytes and seconds of its messages."""
        found: list[dict[str, Any]] = json.loads(self.flwr("list", "here", "--format", "json"))["runs"]
        return next(one for one in found if int(one["run-id"]) == run_id)

    def wait(self, run_id: int, seconds: float) -> dict[str, Any]:
        """Wait for the end of a run, and return its status.

        Raises:
            TimeoutError: If it does not end in time.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = self.status(run_id)
            if str(found["status"]).startswith("finished"):
                return found
            time.sleep(2)
        raise TimeoutError(f"run {run_id} has not ended within {seconds:g} s; see {self.folder / 'server.log'}")

    def flwr(self, *words: str) -> str:
        """Call the program ``flwr``, and return its output."""
        return run("flwr", *words, env=self.environment)

    def stop(self, name: str = "", how: signal.Signals = signal.SIGTERM) -> None:
        """End a process and the processes that it has started; without a name, end all."""
        ended = [name] if name else list(self.processes)
        for one in ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.processes[one].pid, how)
        for one in ended:
            process = self.processes.pop(one)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _wait_for_server(self) -> None:
        deadline = time.monotonic() + STARTING
        while time.monotonic() < deadline:
            if self.processes["server"].poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.2)
        raise RuntimeError(f"the server has not started; see {self.folder / 'server.log'}")


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    """Run a federation as given by the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/federation"))
    parser.add_argument("--secure", action="store_true", help="encrypted connections, and keys of the clients")
    args = parser.parse_args()
    if shutil.which("flower-superlink", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") is None:
        parser.error('Flower is not installed: pip install "fedamm-pl[flower]", here pip install ".[flower]"')
    options = f"--data.num_clients {args.clients} --federation.num_rounds {args.rounds}"
    with LocalFederation(args.folder, args.secure) as federation:
        print(f"server on port {federation.port}, logs in {args.folder}", flush=True)
        for client in range(args.clients):
            federation.start_client(client, client=str(client), state=str(federation.folder / f"state_{client}"))
        run_id = federation.submit(options=options, output_dir=str(federation.folder / "run"))
        found = federation.wait(run_id, 3600)
        print(federation.flwr("log", str(run_id), "here", "--show"))
    print(
        f"{found['status']}; the run's files are in {args.folder / 'run'}, what clients keep in {args.folder}/state_*"
    )
    sys.exit(0 if found["status"] == "finished:completed" else 1)


if __name__ == "__main__":
    main()

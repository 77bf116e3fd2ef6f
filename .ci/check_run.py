"""Check what the quickstart wrote: all files, well above chance, few-shot classes above zero, a model that loads."""

import json
import sys
from pathlib import Path

from fedamm_pl import FedAMM

run = Path(sys.argv[1])
for name in ("config.yaml", "metrics.csv", "summary.json", "final.ckpt"):
    assert (run / name).stat().st_size > 0, name
assert list(run.glob("events.out.tfevents.*"))
assert list((run / "checkpoints").glob("round_*.ckpt"))
final = json.loads((run / "summary.json").read_text())["final"]
assert final["test/acc"] > 0.5, final  # chance is 0.1
assert final["test/acc_few"] > 0, final
FedAMM.load_from_checkpoint(run / "final.ckpt", weights_only=True)
print(
    f"quickstart: {len((run / 'metrics.csv').read_text().splitlines()) - 1} evaluations, accuracy {final['test/acc']:.3f}"
)

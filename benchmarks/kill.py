"""Kills one run again and again with SIGKILL at random times, and compares how it ends.

  python -m benchmarks.kill --workdir runs/kill

The run, and one that nothing disturbs, are of configs/digits.py. Most kills come at a random time
after training has begun, in a step, an evaluation or a save, whichever it is then; the last ones
after the last step, in the final save or writing. Started again, this goes on where it was.
"""

import argparse
import json
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Any

from benchmarks.common import append_result
from train.program import path
from train.store import checkpoint

ARGUMENTS = (
    "--config=configs/digits.py",
    "--config.epochs=60",
    "--config.eval_every_epochs=1",
    "--config.checkpoint_every_steps=10",
    "--config.log_every_steps=1",
)
STEPS = 60 * (1437 // 64)
KILLS_AT_THE_END = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    killed, undisturbed = flags.workdir / "killed", flags.workdir / "undisturbed"
    diary = flags.workdir / "kills.jsonl"
    flags.workdir.mkdir(parents=True, exist_ok=True)

    finish(undisturbed)
    kills = read_lines(diary)
    rng = random.Random(f"{flags.seed} {len(kills)}")
    while len(kills) < flags.kills:
        last_step = STEPS if len(kills) >= flags.kills - KILLS_AT_THE_END else 0
        kill = kill_once(killed, last_step, rng)
        if kill is None:
            continue  # it was quicker; started again, it writes its results again
        kills.append(kill)
        with diary.open("a") as file:
            file.write(json.dumps(kills[-1]) + "\n")
        print(len(kills), kills[-1], flush=True)
    finish(killed)

    record = {"steps": STEPS, "kills": len(kills), **compared(killed, undisturbed)}
    append_result("kill", record | {"at": kills})
    print(json.dumps(record, indent=2))
    if not (record["same_weights"] and record["same_metrics"] and record["same_model"]):
        sys.exit("The killed run ended otherwise than the one that nothing disturbed.")


def start(workdir: pathlib.Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "train.main", *ARGUMENTS, f"--workdir={workdir}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(workdir: pathlib.Path) -> None:
    """Runs to the end."""
    if start(workdir).wait():
        sys.exit(f"The run in {workdir} failed; start it alone to see why.")


def kill_once(workdir: pathlib.Path, after_step: int, rng: random.Random) -> dict[str, Any] | None:
    """Starts the run and kills it, at random, after it has logged a step from `after_step` on.

    Returns:
      What was there when it was killed: the last step logged, and what was being written. None if
      it had ended before.
    """
    saved = newest_saved(workdir)
    process = start(workdir)
    started = time.time()
    while process.poll() is None:
        # What an earlier start logged after its last checkpoint is gone when the events are new.
        opened = changed(workdir / "tensorboard") > started
        # Where all steps were done before, only the results are left to write.
        if opened and (saved == STEPS or last_logged(workdir) > max(saved, after_step - 1)):
            break
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.5 if after_step else 3))
    process.kill()
    if process.wait() != -signal.SIGKILL:
        return None
    return {
        "step": last_logged(workdir),
        "newest_saved": newest_saved(workdir),
        "saving": any(".orbax" in path.name for path in (workdir / "checkpoints").glob("*")),
    }


def compared(killed: pathlib.Path, undisturbed: pathlib.Path) -> dict[str, Any]:
    """Whether both runs ended alike, in every bit that does not depend on the clock."""
    found = [checkpoint.newest(each / "checkpoints") for each in (killed, undisturbed)]
    weights = [checkpoint.digests(each.leaves) if each else {} for each in found]
    metrics = [read_lines(each / "metrics.jsonl") for each in (killed, undisturbed)]
    for record in (*metrics[0], *metrics[1]):
        record.pop("examples_per_second", None)
    steps = [record["step"] for record in metrics[0]]
    models = [(each / "model.npz").read_bytes() for each in (killed, undisturbed)]
    return {
        "same_weights": bool(weights[0]) and weights[0] == weights[1],
        "same_metrics": metrics[0] == metrics[1] and steps == list(range(1, STEPS + 1)),
        "same_model": models[0] == models[1],
        "digests": weights[0],
    }


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, [] without one."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_logged(workdir: pathlib.Path) -> int:
    """The last step with a whole line in metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def newest_saved(workdir: pathlib.Path) -> int:
    """The step of the newest checkpoint."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def changed(path: pathlib.Path) -> float:
    """When a folder was changed last, in seconds."""
    return path.stat().st_mtime if path.exists() else 0.0


if __name__ == "__main__":
    main()

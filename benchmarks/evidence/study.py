"""Runs settings of the study, a GPU each at a time, as far as they have not been run.

    python benchmarks/evidence/texts.py texts
    python benchmarks/evidence/study.py finetune noise

Models that a setting begins with are trained before it. Then all its lanes are compiled at once,
two steps each, since to compile them one after the other would take longer than to race them; what
was compiled is kept in torch's cache, for the race. A race that was stopped goes on where it was;
as long as there is one, the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

FOLDER = Path(__file__).parent
COMMAND = (sys.executable, "-c", "from cggr.cli import main; main(prog_name='cggr')", "race")


def options_of(setting: str) -> dict[str, Any]:
    """The configuration of a setting."""
    return tomllib.loads((FOLDER / f"{setting}.toml").read_text(encoding="utf-8"))


def needed(settings: Sequence[str]) -> list[str]:
    """The settings whose models these begin with, those that others begin with first."""
    folders = [options_of(name).get(key) for name in settings for key in ("model", "reference")]
    models = [Path(folder).parent.name for folder in folders if folder]
    return list(dict.fromkeys([*(needed(models) if models else []), *models]))


def is_trained(model: str) -> bool:
    """Whether it is there, for others to begin with."""
    return (Path("runs") / model / "model").exists()


def next_of(waiting: Mapping[str, Sequence[str]], ended: Set[str]) -> str | None:
    """The first that has all that it needs; None if there is none yet."""
    return next((name for name, needs in waiting.items() if ended >= set(needs)), None)


def smallest_text(folder: Path, *, least: int = 300_000) -> Path:
    """The smallest part of a text that suffices to compile for."""

    def size(part: Path) -> int:
        return sum(file.stat().st_size for file in part.rglob("*") if file.is_file())

    return min((part for part in folder.iterdir() if size(part) >= least), key=size)


class Study:
    """What runs on the GPUs.

    Args:
        console: Where it is shown.
        log: Folder of what the races say.
        deadline: Of the host's clock; no race begins after it, and those that run are stopped.
        first: So many lanes of a setting, from its first on; all if None.
        extra: Options for every race, such as ``["--seeds", "1"]``.
    """

    def __init__(
        self,
        console: Console,
        log: Path,
        deadline: float,
        first: int | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        self.console = console
        self.log = log
        self.deadline = deadline
        self.first = first
        self.extra = list(extra)
        self.unfinished: list[str] = []
        self.begin = time.monotonic()

    def say(self, text: str) -> None:
        """A line, and when."""
        spent = time.monotonic() - self.begin
        self.console.print(f"{spent:6.0f} s  {text}", highlight=False, markup=False, soft_wrap=True)

    def ended(self, setting: str, done: bool, how: str) -> None:
        """Says how a setting ended, and keeps in mind what is not done."""
        if not done:
            self.unfinished.append(setting)
        self.say(f"{setting}: {how}")

    def can_begin(self, setting: str, if_not: str) -> bool:
        """Whether there are the models that it begins with; says so if not."""
        for model in needed([setting]):
            if not is_trained(model):
                self.ended(setting, False, f"{if_not}, there is no runs/{model}/model")
                return False
        return True

    def call(self, gpu: int, name: str, *arguments: str) -> bool:
        """Runs a race; whether it came to its end in time."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            return False
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        device = visible.split(",")[gpu] if visible else str(gpu)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": device}
        with (self.log / f"{name}.txt").open("w") as said:
            process = subprocess.Popen(
                [*COMMAND, *arguments], stdout=said, stderr=subprocess.STDOUT, env=environment
            )
            try:
                return process.wait(left) == 0
            except subprocess.TimeoutExpired:
                process.kill()  # its results are on disk after every run
                process.wait()
                return False

    def train(self, gpu: int, setting: str) -> None:
        """A model that others begin with, if it is not there."""
        if not is_trained(setting) and self.can_begin(setting, "not trained"):
            config = str(FOLDER / f"{setting}.toml")
            done = self.call(gpu, setting, "--config", config, "--name", setting)
            self.ended(setting, done, "trained" if done else "not trained")

    def compile(self, gpu: int, setting: str, lanes: Sequence[str]) -> None:
        """All lanes at once, for the cache."""
        text = smallest_text(Path(options_of(setting)["text"][0]))
        threads = max(1, (os.cpu_count() or 1) // (2 * len(lanes)))

        def one(number: int) -> bool:
            name = f"{setting}-compiled-{number}"
            short = ("--budget=2steps", "--eval-every=2steps", "--seeds=1", "--learning-rates=1e-3")
            here = (f"--text={text}", f"--lanes={lanes[number]}", f"--threads={threads}")
            config = ("--config", str(FOLDER / f"{setting}.toml"), f"--output={self.log}")
            return self.call(gpu, name, *config, *here, *short, f"--name={name}")

        with ThreadPoolExecutor(len(lanes)) as pool:
            for lane, done in zip(lanes, pool.map(one, range(len(lanes))), strict=True):
                if not done:
                    self.say(f"{setting}: {lane} was not compiled")
        self.say(f"{setting}: compiled")

    def race(self, gpu: int, setting: str) -> None:
        """A setting from beginning to end, if there are the models that it begins with."""
        if not self.can_begin(setting, "not raced"):
            return
        options = options_of(setting)
        lanes = list(options["lanes"])[: self.first]
        if options.get("compiled"):
            self.compile(gpu, setting, lanes)
        config = ("--config", str(FOLDER / f"{setting}.toml"), "--name", setting, "--resume")
        done = self.call(gpu, setting, *config, f"--lanes={','.join(lanes)}", *self.extra)
        self.ended(setting, done, "raced" if done else "stopped")

    def run(self, settings: Sequence[str], gpus: int) -> None:
        """Settings in this order as GPUs become free, each when the models that it needs are."""
        waiting: dict[str, list[str]] = {}  # what is to be done, and after what
        for setting in settings:
            for name in (*needed([setting]), setting):
                waiting[name] = needed([name])
        ended: set[str] = set()
        failed: list[OSError] = []
        changed = threading.Condition()

        def take() -> str | None:
            with changed:
                changed.wait_for(lambda: not waiting or next_of(waiting, ended))
                name = next_of(waiting, ended)
                if name is not None:
                    del waiting[name]
                return name

        def follow(gpu: int) -> None:
            while name := take():
                try:
                    (self.race if name in settings else self.train)(gpu, name)
                except OSError as error:  # such as a text that is gone; others have theirs
                    self.say(f"{name}: {error}")
                    failed.append(error)
                finally:
                    with changed:
                        ended.add(name)
                        changed.notify_all()

        with ThreadPoolExecutor(gpus) as pool:
            try:
                for done in [pool.submit(follow, gpu) for gpu in range(gpus)]:
                    done.result()
            except KeyboardInterrupt:
                self.deadline = 0.0  # what runs has been told too; nothing begins any more
                with changed:
                    waiting.clear()
                    changed.notify_all()
                raise
        if failed:
            raise failed[0]


def main() -> None:
    """Runs the settings that are named."""
    known = [
        path.stem for path in sorted(FOLDER.glob("*.toml")) if "save" not in options_of(path.stem)
    ]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", help=f"of {', '.join(known)}; all if none is named")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="to stop after")
    parser.add_argument("--log", type=Path, default=Path("runs/log"))
    parser.add_argument(
        "--first",
        type=int,
        metavar="N",
        help="only the first N lanes of each; later more, not less",
    )
    options, extra = parser.parse_known_args()
    settings = options.settings or known
    for setting in settings:
        if setting not in known:
            parser.error(f"there is no setting {setting!r}, only {', '.join(known)}")
    if options.first is not None and options.first < 1:
        parser.error(f"--first must be 1 or more, got {options.first}")
    missing = (model for model in needed(settings) if not is_trained(model))
    for setting in (*settings, *missing):
        for text in options_of(setting)["text"]:
            if not Path(text).is_dir():
                parser.error(f"{setting} needs {text}: python benchmarks/evidence/texts.py texts")
    options.log.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    study = Study(Console(), options.log, deadline, options.first, extra)
    study.run(settings, max(1, torch.cuda.device_count()))
    if study.unfinished:
        sys.exit(f"not complete: {', '.join(study.unfinished)}; {options.log} has why")


if __name__ == "__main__":
    main()

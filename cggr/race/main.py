"""A race from its settings to its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cggr.race import engine, machine, pretrained, report, text, tokens
from cggr.race.backend import Backend
from cggr.race.display import watch
from cggr.race.settings import RaceError, RaceSettings


def race(
    settings: RaceSettings,
    backend: Backend,
    folder: Path,
    console: Console,
    *,
    threads: int | None = None,
    resume: bool = False,
) -> bool:
    """Runs a race and writes its report.

    Args:
        settings: The race.
        backend: The framework that the settings name.
        folder: Folder of the report, which is made if it is missing.
        console: Where the race is shown.
        threads: CPU threads of the framework; its own choice if None.
        resume: Whether runs that the folder's results.json holds need not be run again.

    Returns:
        Whether every lane came to its end; False after Ctrl-C.

    Raises:
        RaceError: The race cannot run as asked.
        KeyboardInterrupt: Ctrl-C before anything was measured.
    """
    if threads is not None:
        backend.set_threads(threads)
    device = backend.find_device(settings.device)
    runtime = backend.runtime(device)
    with console.status("reading the text"):
        documents, notes = text.read_documents(settings.text)
        if settings.pairs:  # here, where a line has the number that it has in its file
            for _ in text.pairs_of(documents):
                pass
        split = text.split_documents(documents, notes, pairs=settings.pairs)
        if settings.noise:
            split = text.with_noise(split, settings.noise)
    with console.status("tokenizing"):
        tokenizer, end_of_text = None, None
        # A new model has the tokenizer of its reference: losses of other tokens would say nothing.
        source = settings.model or settings.reference
        if source is not None:
            option = "--reference" if settings.model is None else "--model"
            tokenizer, end_of_text = pretrained.load_tokenizer(source, option)
        corpus = tokens.prepare(
            split,
            vocab_size=settings.vocab_size,
            pairs=settings.pairs,
            tokenizer=tokenizer,
            end_of_text=end_of_text,
        )

    reference_nll = None
    if settings.reference is not None:
        with console.status("scoring the text by the reference"):
            reference_nll = backend.reference_losses(settings, corpus, device)

    def make_batches(seed: int, lane: str) -> tokens.BatchFunction:
        learns_prompts = settings.lane(lane).learns_prompts
        return tokens.batches(
            corpus.training,
            batch_size=settings.lane_batch_size(lane),
            sequence_length=settings.sequence_length,
            seed=seed,
            labels=None if learns_prompts else corpus.training_labels,
            prompt=0 if learns_prompts else settings.prompt_tokens,
            reference_nll=reference_nll,
        )

    for lane in settings.lanes:  # a text that is too short is found before a model is built
        make_batches(0, lane)
    if len(corpus.heldout) <= max(1, settings.prompt_tokens):
        raise RaceError(
            f"the text is too short: {len(corpus.heldout)} held-out tokens, of which none follows "
            f"a prompt of {settings.prompt_tokens}; give more text, or a smaller --prompt or "
            f"--sequence-length"
        )
    with console.status("building the model"):
        parameters = backend.count_parameters(settings, corpus)
    where = runtime.gpu or machine.cpu_name()
    subtitle = (
        f"{'fine-tuning' if settings.model else 'training'} {parameters / 1e6:.1f} M parameters "
        f"with {settings.backend}, "
        f"batch {settings.batch_size} x {settings.sequence_length}"
        f"{f', prompts of {settings.prompt_tokens}' if settings.prompt_tokens else ''}"
        f"{', prompts and completions' if settings.pairs else ''}, "
        f"ratio {settings.ratio:g}, {settings.scoring} / {settings.selection}, "
        f"{text.source_name(settings.text)} ({len(corpus.training) / 1e6:.2f} M tokens), {where}"
    )
    for line in (subtitle, *split.notes):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RaceError(f"cannot make the folder {folder}: {error.strerror}") from None

    described = {
        "source": text.source_name(settings.text),
        "sha256": split.digest,
        "training_files": len(split.training),
        "heldout_files": [document.name for document in split.heldout],
        "notes": list(split.notes),
    }
    models = {
        name: pretrained.digest(path)
        for name, path in (("model", settings.model), ("reference", settings.reference))
        if path is not None
    }
    environment = machine.environment(runtime)
    file = folder / report.RESULTS
    done = []
    if resume:
        done = report.earlier_runs(file, settings, split.digest, models, environment)

    def results(runs: Sequence[engine.Run]) -> dict[str, object]:
        return report.results(
            runs, settings, corpus, text=described, models=models, environment=environment
        )

    def finished(run: engine.Run, lane: engine.Lane, runs: Sequence[engine.Run]) -> None:
        """Keeps what has been measured, and the best model that is to be saved."""
        first = [other for other in runs if (other.lane, other.seed) == (settings.save, 0)]
        if run in first and engine.best_rate(first) == run.learning_rate:
            # Before the results: what they hold need not run again.
            lane.save(folder / "model")
            (folder / "model" / "tokenizer.json").write_text(corpus.tokenizer, encoding="utf-8")
        report.write_results(file, results(runs))

    with watch(console, settings) as watcher:
        runs = engine.run_race(
            settings,
            make_lane=backend.make_lanes(settings, corpus, device),
            make_batches=make_batches,
            watcher=watcher,
            done=done,
            finished=finished,
        )
    if not runs:
        raise KeyboardInterrupt
    found = results(runs)
    report.write_results(file, found)
    report.write_report(folder, runs, settings, corpus, subtitle, console)
    if not found["complete"]:
        console.print("Interrupted: the report holds what was measured until then.")
    console.print(f"Report: {folder / 'report.png'}, results.json and table.txt beside it")
    return bool(found["complete"])

"""``focus-ray trace``: one prompt, and what each denoising step did with each position."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from focus_ray import __version__
from focus_ray.cli.chat import SystemOption
from focus_ray.cli.engine_flags import (
    CommandSampling,
    errors_in_words,
    light_engine_flags,
    located,
    sampling_flags,
)
from focus_ray.cli.generate import (
    RAW_MAX_TOKENS,
    FileOption,
    PromptArgument,
    RawOption,
    conversation,
    read_prompt,
)
from focus_ray.cli.trace_picture import draw
from focus_ray.cli.trace_records import Trace, TraceHeader, trace_of
from focus_ray.config import DEFAULT_MODEL, EngineConfig
from focus_ray.sampling import fill_in

STDOUT = Path("-")

SHOWN = (
    *("temperature", "seed", "unmasking", "confidence_threshold", "denoising_steps"),
    *("editing_threshold", "max_post_steps"),
)
"""The sampling that the header shows."""


@light_engine_flags
@sampling_flags
def trace(
    engine: EngineConfig,
    sampling: CommandSampling,
    prompt: PromptArgument = None,
    file: FileOption = None,
    raw: RawOption = False,
    output: Annotated[
        Path | None,
        typer.Option(help="JSONL file; '-': standard output, as without --output and --picture."),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="SVG file to draw.")] = None,
    columns: Annotated[
        int, typer.Option(min=1, help="Picture: positions side by side; the rest goes below.")
    ] = 64,
    max_steps: Annotated[
        int, typer.Option(min=1, help="Picture: most steps drawn; the JSONL has all of them.")
    ] = 200,
    model: Annotated[
        str | None,
        typer.Option(help="Bundled name, local directory, or hub id.", show_default=DEFAULT_MODEL),
    ] = None,
    system: SystemOption = None,
) -> None:
    """Answer one prompt and show what each step did with each position.

    The JSONL has a header, one object per step, and a summary. The lists of a step are aligned with
    its "positions", which are those of the current block: blocks after it have not begun, blocks
    before it are committed. The block right before it is so from its first step on, which computes
    the "leftover" positions of that block once more and makes their KV final. "states" says what
    holds after the step:

    \b
    masked    still masked, computed in full (decodings that evict nothing)
    retained  still masked, computed in full (decoding focus)
    evicted   still masked, left out: after layer 1, or, where "processed" is
              false, before layer 0
    decoded   has its token: "newly_decoded" from this step, otherwise from an
              earlier one or the prompt; "edited" where this step replaced it

    "confidence" is the probability of the token that the step proposed for a masked position or put
    in place of another one, "delta" a position's importance in layer 1 less that in layer 0; null
    where there is none.
    """
    notes = Console(stderr=True, highlight=False)
    with errors_in_words():
        text = read_prompt(prompt, file)
        if raw and system:
            raise ValueError("--system needs a chat template; leave out --raw or --system")
        check_destinations(output, picture)
        if raw and sampling.max_tokens is None:
            sampling = sampling.model_copy(update={"max_tokens": RAW_MAX_TOKENS})
        config = located(engine, model)
        if config.focus_adaptive is None:  # who looks at eviction wants to see it
            config = config.model_copy(update={"focus_adaptive": False})
        with notes.status(f"running {config.model}"):
            found = record(config, sampling, text, system=system, raw=raw)
        lines = "".join(line + "\n" for line in found.lines())
        if output == STDOUT or not (output or picture):
            typer.echo(lines, nl=False)
        elif output:
            write(output, lines)
        if picture:
            write(picture, draw(found, columns=columns, max_steps=max_steps))
    notes.print(found.summary.text, markup=False, soft_wrap=True)
    notes.print(found.summary.totals, style="dim", soft_wrap=True)


def check_destinations(output: Path | None, picture: Path | None) -> None:
    """Refuse what could not be written, before a model is loaded for it.

    Raises:
        ValueError: names the flag and the remedy.
    """
    if picture is not None and picture.suffix.lower() != ".svg":
        raise ValueError(f"--picture draws SVG: give a file name that ends in .svg, not {picture}")
    if output is not None and output == picture:
        raise ValueError(f"--output and --picture both name {output}; give two files")
    for flag, path in (("--output", output), ("--picture", picture)):
        if path is None or path == STDOUT:
            continue
        if path.is_dir():
            raise ValueError(f"{flag}: {path} is a folder; name a file in it")
        if not path.parent.is_dir():
            raise ValueError(f"{flag}: there is no folder {path.parent}; make it first")


def record(
    config: EngineConfig,
    sampling: CommandSampling,
    text: str,
    *,
    system: str | None = None,
    raw: bool = False,
) -> Trace:
    """Run the prompt in this process.

    Args:
        system: system prompt.
        raw: continue ``text`` as it is, without chat template and system prompt.

    Raises:
        CheckpointError: the model cannot be loaded.
        RequestRejected: the prompt cannot be served.
        ValueError: the configuration does not fit the model or the machine.
    """
    from focus_ray.llm import LLM
    from focus_ray.models.checkpoint import resolve_checkpoint
    from focus_ray.models.spec import read_spec

    path = resolve_checkpoint(config.model, config.revision)
    spec = read_spec(path, block_length=config.block_length, name=config.model)
    with LLM(**config.model_dump(exclude={"record_trace"}), record_trace=True) as llm:
        params = fill_in(sampling, llm.get_default_sampling_params())
        if raw:
            [answered] = llm.generate(text, params, use_tqdm=False)
        else:
            [answered] = llm.chat(conversation(text, system), params, use_tqdm=False)
        tokenizer = llm.get_tokenizer()
        assert tokenizer is not None, "text was encoded without a tokenizer"
        header = TraceHeader(
            version=__version__,
            model=config.model,
            decoding=config.decoding,
            eviction_policy=config.eviction_policy if config.decoding == "focus" else None,
            focus_alpha=config.focus_alpha if config.decoding == "focus" else None,
            block_length=spec.block_length,
            **params.model_dump(include=set(SHOWN)),
            prompt=text,
            prompt_token_ids=tuple(answered.prompt_token_ids),
            prompt_tokens=tuple(map(tokenizer.token_text, answered.prompt_token_ids)),
        )
        return trace_of(header, answered.outputs[0], tokenizer.token_text)


def write(path: Path, text: str) -> None:
    """Raises ValueError, naming the file, where it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None

"""jql-export: the command line."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jql_engine.cli.options import run_command
from jql_engine.printing import say
from jql_engine.template import Template
from jql_export.defaults import EDU_HEADS, EDU_REPOSITORY, SNOWFLAKE
from jql_export.place import check_place

if TYPE_CHECKING:
    from jql_engine.bundle import Bundle, EngineKey

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

TENSORRT = "tensorrt-fp16"
# Options that only make sense for an export, and only for a certificate.
OF_EXPORT = ("out", "no_heads", "variant", "compute_capability", "library", "encoder_onnx", "overwrite")
OF_CERTIFICATE = ("bundle", "documents", "text_column")


@app.command()
def export(
    ctx: typer.Context,
    out: Annotated[Path | None, typer.Option(help="The bundle to write.", show_default=False)] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint directory or hub id (or ID@REVISION) of the encoder; by default the classifier's, else "
            f"{SNOWFLAKE}.",
            show_default=False,
        ),
    ] = None,
    head: Annotated[
        list[str],
        typer.Option(
            help="NAME=FILE, the checkpoint of a head (JQL's, FineWeb2-HQ's); repeat. By default the JQL-Edu heads.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    classifier: Annotated[
        list[str],
        typer.Option(
            help="NAME=DIRECTORY, NAME=ID on the hub or NAME=ID@REVISION of a sequence classifier; repeat where they "
            "share an encoder.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    activation: Annotated[
        Literal["sigmoid", "softmax"] | None,
        typer.Option(help="Activation on the classifiers' outputs; by default none: scores are raw logits."),
    ] = None,
    no_heads: Annotated[bool, typer.Option("--no-heads", help="A bundle that only embeds.")] = False,
    pooling: Annotated[str | None, typer.Option(help="cls or mean, where the checkpoint does not say it.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest input, special tokens included.")] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help=r"What documents are made of, like '{url}\n\n{text}': columns in braces, {text} among them.",
            show_default=False,
        ),
    ] = None,
    windows: Annotated[
        Literal["first", "first+last", "all"],
        typer.Option(
            help="Windows of a document longer than --max-tokens that are scored; jql-run may ask for others."
        ),
    ] = "first",
    aggregate: Annotated[
        Literal["max", "mean"] | None,
        typer.Option(help="How the scores of several windows become one; by default max."),
    ] = None,
    variant: Annotated[
        list[str],
        typer.Option(
            help="Graph to write: cpu-fp32 (the default without --encoder-onnx), openvino-fp32, openvino-bf16, "
            "cuda-fp16 (together with cuda-fp32), cuda-bf16, cuda-fp32, tensorrt-fp16, standard-fp32; repeat.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    compute_capability: Annotated[
        list[str],
        typer.Option(
            help="Build a TensorRT engine for this compute capability, like 8.0, into the bundle; repeat.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    library: Annotated[
        Literal["tensorrt", "tensorrt-rtx"] | None,
        typer.Option(help="Library that builds TensorRT engines; by default tensorrt-rtx."),
    ] = None,
    encoder_onnx: Annotated[
        Path | None, typer.Option(help="ONNX file of the same encoder, made elsewhere: the graph foreign-fp32.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of the encoder's repository, or the classifiers'.")
    ] = None,
    heads_revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of the default heads' repository.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle at --out.")] = False,
    certify: Annotated[
        str | None,
        typer.Option(
            help="Write no bundle, but a certificate into --bundle: how many documents of this corpus (parquet, JSON "
            "Lines) each graph decides otherwise than PyTorch. Needs the encoder and heads that it was made of.",
            show_default=False,
        ),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="For --certify: the bundle that gets the certificate.", show_default=False)
    ] = None,
    documents: Annotated[int, typer.Option(min=2, help="For --certify: documents to draw.")] = 2_000,
    text_column: Annotated[str, typer.Option(help="For --certify: column with the documents.")] = "text",
) -> None:
    """Turn an encoder and its heads or classifiers into a bundle: a graph for each variant, checked against PyTorch."""
    _check_certify(ctx, certify is not None)
    filled = _template(template)
    pairs = [_named(value, "--head", "NAME=FILE") for value in head]
    classifiers = [_named(value, "--classifier", "NAME=DIRECTORY or hub id") for value in classifier]
    if activation is not None and not classifiers:
        raise typer.BadParameter("is for --classifier, which is not asked for", param_hint="--activation")
    if aggregate is not None and windows == "first":
        raise typer.BadParameter("is for --windows first+last or all", param_hint="--aggregate")
    _check_heads((encoder or SNOWFLAKE).partition("@")[0], bool(pairs or classifiers), no_heads, heads_revision)
    if library and not compute_capability:
        raise typer.BadParameter("say for which GPU engines are to be built", param_hint="--compute-capability")
    if compute_capability and TENSORRT not in variant:
        raise typer.BadParameter(f"is for --variant {TENSORRT}, which is missing", param_hint="--compute-capability")
    warnings.filterwarnings("ignore")  # torch and transformers warn of what this command checks itself
    from transformers.utils import logging as transformers_logging

    from jql_engine.bundle import Bundle, WindowsInfo
    from jql_engine.certificate import CERTIFICATE
    from jql_engine.sessions.tensorrt.build import RTX
    from jql_engine.sessions.tensorrt.cache import build_ahead
    from jql_export.bundle import export_bundle
    from jql_export.certificate import certify_bundle, summary
    from jql_export.hub import edu_heads, find_checkpoint
    from jql_export.readouts.classifier import read_classifier
    from jql_export.readouts.head_file import read_head

    quiet: Any = transformers_logging  # untyped
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()

    def build(bundle: Bundle) -> dict[str, EngineKey]:
        return dict(build_ahead(bundle, TENSORRT, wanted, library or RTX, say) for wanted in compute_capability)

    if certify is not None and bundle is not None:
        _check_defaults(Bundle.open(bundle), bool(encoder or classifiers), bool(pairs or classifiers or no_heads))
    found = [find_checkpoint(place, None if encoder else revision) for _, place in classifiers]
    heads = [read_head(name, Path(file)) for name, file in pairs] + [
        read_classifier(name, one.directory, activation, one.id if one.revision else None, one.revision)
        for (name, _), one in zip(classifiers, found, strict=True)
    ]
    if not heads and not no_heads:
        heads = edu_heads(heads_revision)
    own = found[0] if found and encoder is None else None
    checkpoint = own or find_checkpoint(encoder or SNOWFLAKE, revision)
    if certify is not None and bundle is not None:
        _check_settings(ctx, Bundle.open(bundle), filled)
        certificate = certify_bundle(
            bundle, checkpoint, heads, certify, text_column=text_column, n_docs=documents, report=say
        )
        say(f"{bundle / CERTIFICATE}: {summary(certificate)}")
        return
    assert out is not None, "checked above"
    written = export_bundle(
        checkpoint,
        heads,
        out,
        pooling=pooling,
        max_tokens=max_tokens,
        variants=variant or ([] if encoder_onnx else ["cpu-fp32"]),
        overwrite=overwrite,
        report=say,
        encoder_onnx=encoder_onnx,
        build=build,
        template=filled,
        windows=WindowsInfo(windows, aggregate or "max"),
    )
    names = f"heads {', '.join(written.heads)}" if written.heads else "no heads"
    say(f"{written.path}: bundle {written.hash[:12]}, {names}")


def _given(ctx: typer.Context, names: Sequence[str]) -> list[str]:
    sources = {name: ctx.get_parameter_source(name) for name in names}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_certify(ctx: typer.Context, certify: bool) -> None:
    wanted = "bundle" if certify else "out"
    for name in _given(ctx, OF_EXPORT if certify else OF_CERTIFICATE):
        why = "is for an export; --certify writes a certificate into --bundle" if certify else "is for --certify"
        raise typer.BadParameter(why, param_hint=_flag(name))
    if ctx.params[wanted] is None:
        raise typer.BadParameter(f"give the bundle to {'certify' if certify else 'write'}", param_hint=_flag(wanted))
    if not certify:
        check_place(ctx.params["out"], ctx.params["overwrite"])  # before anything is downloaded


def _check_settings(ctx: typer.Context, bundle: Bundle, template: Template | None) -> None:
    """A bundle says how its documents are read; who repeats it must mean the same."""
    m = bundle.manifest
    has = {"pooling": m.pooling, "max_tokens": m.max_tokens, "template": m.template}
    has |= {"windows": m.windows.take, "aggregate": m.windows.aggregate}
    asked = ctx.params | {"template": template and template.source}
    for name in _given(ctx, list(has)):
        if asked[name] != has[name]:
            raise typer.BadParameter(f"{bundle.path} has {has[name]!r}, not {asked[name]!r}", param_hint=_flag(name))


def _check_defaults(bundle: Bundle, encoder_given: bool, heads_given: bool) -> None:
    """Where the bundle was not made of the defaults, those are not worth a download."""
    m = bundle.manifest
    if not encoder_given and m.encoder.id != SNOWFLAKE:
        raise typer.BadParameter(f"give it: {bundle.path} was made of {m.encoder.id}", param_hint="--encoder")
    if not m.readouts:
        raise typer.BadParameter(f"{bundle.path} has no heads: nothing is decided by it", param_hint="--bundle")
    if not heads_given and (names := [one.name for one in m.readouts]) != list(EDU_HEADS):
        raise typer.BadParameter(f"give those of {bundle.path}: {', '.join(names)}", param_hint="--head")


def _check_heads(encoder: str, given: bool, no_heads: bool, heads_revision: str | None) -> None:
    if no_heads and given:
        raise typer.BadParameter("leaves no place for --head", param_hint="--no-heads")
    if heads_revision is not None and (given or no_heads):
        raise typer.BadParameter("is for the default heads, which are not asked for", param_hint="--heads-revision")
    if not (given or no_heads) and encoder != SNOWFLAKE:
        raise typer.BadParameter(
            f"is missing: the default heads ({EDU_REPOSITORY}) read embeddings of {SNOWFLAKE} and of nothing "
            f"else, so {encoder} needs its own: give --head NAME=FILE.ckpt, or --no-heads to embed only",
            param_hint="--head",
        )


def _template(source: str | None) -> Template | None:
    r"""The template with line breaks and tabs for `\n` and `\t`, which a shell leaves as they are."""
    try:
        return None if source is None else Template(source.replace("\\n", "\n").replace("\\t", "\t"))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--template") from error


def _named(value: str, option: str, form: str) -> tuple[str, str]:
    name, separator, place = value.partition("=")
    if not (name and separator and place):
        raise typer.BadParameter(f"{value!r} is not {form}", param_hint=option)
    return name, place


def main() -> None:
    """Exit 0 done, 1 failed, 2 misuse."""
    run_command(app, "jql-export")


if __name__ == "__main__":
    main()

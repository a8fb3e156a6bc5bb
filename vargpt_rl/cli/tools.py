"""Groups of subcommands around a run: ``data``, ``reward``, ``model``, ``cluster``."""

from pathlib import Path
from typing import Annotated

import typer

from vargpt_rl.cli.programs import Program, add_program, call, command_class, help_text, settings_argument

DATA = (
    Program(
        name="encode",
        module="vargpt_rl.data.encode",
        summary="Encode the images of training records once, into a cache that supervised stages read.",
        examples=(
            "vargpt-rl data encode checkpoint=DIR out=cache resolution=256 'sources.mine.files=[images/*.jsonl]'",
        ),
        settings=("vargpt_rl.data.encode:Encoding",),
    ),
    Program(
        name="instruct",
        module="vargpt_rl.data.instruct.__main__",
        summary="Make dialogues about drawing from captions, by templates or a language model.",
        examples=(
            "vargpt-rl data instruct captions=captions.jsonl out=dialogues.jsonl method=template",
            "vargpt-rl data instruct captions=captions.parquet out=dialogues.jsonl method=llm endpoint=URL model=NAME",
        ),
        settings=("vargpt_rl.data.instruct.__main__:InstructCommand",),
    ),
    Program(
        name="prompts",
        module="vargpt_rl.data.prompts",
        summary="Make a file of prompts for the iterations, of Midjourney's.",
        examples=("vargpt-rl data prompts 'files=[midjourney/*.parquet]' out=prompts.jsonl",),
        settings=("vargpt_rl.data.prompts:PromptsCommand",),
    ),
)
DESCRIBE = Program(
    name="describe",
    module="vargpt_rl.data.preferences",
    summary="Describe the preference pairs of a table.",
    examples=("vargpt-rl data describe runs/shapes-128-256/preferences/iter-00.parquet",),
)
TEST = Program(
    name="test",
    module="rewards.testing",
    summary="Check a reward against the contract of rewards, with images of its own; key=value go to a class.",
    examples=("vargpt-rl reward test my_reward.py:colourful", "vargpt-rl reward test rewards.shapes:shapes_reward"),
)
SERVE = Program(
    name="serve",
    module="rewards.serve",
    summary="Serve a reward over HTTP, for rewards.remote. Needs the extra `serve`.",
    examples=("vargpt-rl reward serve path=my_reward.py:colourful port=8000",),
    settings=("rewards.serve:Serve",),
)
MODEL = (
    Program(
        name="convert",
        module="vargpt_rl.convert",
        summary="Convert a published checkpoint to a model folder, or back. Tensors are copied bit by bit.",
        examples=(
            "vargpt-rl model convert source=VARGPT-v1.1 target=model to=hf",
            "vargpt-rl model convert source=model target=released to=release",
        ),
        settings=("vargpt_rl.convert:Conversion",),
    ),
    Program(
        name="assemble",
        module="vargpt_rl.assemble",
        summary="Assemble the starting point of VARGPT-v1.1's training from its three published parts.",
        examples=(
            "vargpt-rl model assemble language=Qwen2-VL-7B decoder=infinity.pth image_tokenizer=vae.pth target=start",
        ),
        settings=("vargpt_rl.assemble:Assembly",),
    ),
)
INFO = Program(
    name="info",
    module="vargpt_rl.model.summary",
    summary="Say what a model folder holds: family, parameters by part, dtype, how it draws. No weights are loaded.",
    examples=("vargpt-rl model info runs/demo/model", "vargpt-rl model info tiny"),
)
LAUNCH = Program(
    name="launch",
    module="vargpt_rl.launch",
    summary="Submit a run as a Slurm job. All other keys are the run's, see `vargpt-rl run --help`.",
    examples=(
        "vargpt-rl cluster launch nodes=4 gpus_per_node=8 time=24:00:00 name=first data=captioned ...",
        "vargpt-rl cluster launch --dry-run nodes=1 name=first",
    ),
    settings=("vargpt_rl.launch:SlurmJob",),
    passes_on=True,
)
CLUSTER = (
    Program(
        name="doctor",
        module="vargpt_rl.doctor",
        summary="Check the installation, and whether a run fits into memory. Other keys are the run's.",
        examples=(
            "vargpt-rl cluster doctor",
            "vargpt-rl cluster doctor experiment=vargpt_v1_1 gpus=8 gpu_memory_gib=80",
        ),
        settings=("vargpt_rl.doctor:DoctorSettings",),
        passes_on=True,
    ),
    Program(
        name="simulate",
        module="vargpt_rl.simulate.__main__",
        summary="Predict the time of an iteration on more GPUs, from measured costs.",
        examples=(
            "vargpt-rl cluster simulate costs=costs.json 'gpus=[8,64]'",
            "vargpt-rl cluster simulate costs=costs.json placement=colocated",
        ),
        settings=("vargpt_rl.simulate.__main__:SimulateSettings",),
    ),
    Program(
        name="measure",
        module="vargpt_rl.simulate.measure",
        summary="Measure the costs that `simulate` reads.",
        examples=("vargpt-rl cluster measure out=costs.json",),
        settings=("vargpt_rl.simulate.measure:MeasureSettings",),
    ),
)


def group(app: typer.Typer, name: str, summary: str, programs: tuple[Program, ...]) -> typer.Typer:
    """Add a group of subcommands, whose help ends with an example of each of some programs."""
    examples = "\n".join(["\b", "Examples:", *(f"  {program.examples[0]}" for program in programs)])
    made = typer.Typer(help=summary, epilog=examples, no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(made, name=name)
    return made


def add_tool_groups(app: typer.Typer) -> None:
    """Add ``data``, ``reward``, ``model`` and ``cluster``."""
    data = group(app, "data", "Prepare training data, and look at preference pairs.", (*DATA, DESCRIBE))
    for program in DATA:
        add_program(data, program)

    @data.command(DESCRIBE.name, help=help_text(DESCRIBE.summary), cls=command_class(DESCRIBE))
    def describe(file: Annotated[Path, typer.Argument(help="A Parquet file of preference pairs.")]) -> None:
        call(DESCRIBE.module, ["describe", str(file)])

    reward = group(app, "reward", "Test and serve rewards.", (TEST, SERVE))

    @reward.command(TEST.name, help=help_text(TEST.summary), cls=command_class(TEST))
    def test(
        reward: Annotated[str, typer.Argument(metavar="REWARD", help="file.py:name or module:name.")],
        settings: settings_argument(TEST) = None,  # type: ignore[valid-type]
    ) -> None:
        call(TEST.module, [reward, *(settings or [])])

    add_program(reward, SERVE)
    model = group(app, "model", "Describe, convert and assemble checkpoints.", (*MODEL, INFO))
    for program in MODEL:
        add_program(model, program)

    @model.command(INFO.name, help=help_text(INFO.summary), cls=command_class(INFO))
    def info(checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A folder or a hub name.")]) -> None:
        call(INFO.module, [checkpoint])

    cluster = group(app, "cluster", "Plan, predict and submit runs on GPUs.", (LAUNCH, *CLUSTER))

    @cluster.command(LAUNCH.name, help=help_text(LAUNCH.summary), cls=command_class(LAUNCH))
    def launch(
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the job's files, submit nothing.")] = False,
        settings: settings_argument(LAUNCH) = None,  # type: ignore[valid-type]
    ) -> None:
        call(LAUNCH.module, [*(["--dry-run"] if dry_run else []), *(settings or [])])

    for program in CLUSTER:
        add_program(cluster, program)

"""What the command line says: a config file, changes to it, a workdir, and the job's processes."""

import dataclasses
import inspect
import pathlib
import runpy
import textwrap
import traceback
from collections.abc import Mapping, Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from train import config as config_lib
from train import program
from train.config import Config
from train.errors import UserError


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
      config: the experiment.
      workdir: the run's folder.
      coordinator_address: see `train.run.cluster.join`, as for the two below.
      num_processes: how many the job has.
      process_id: which of them this one is, from 0.
    """

    config: Config
    workdir: pathlib.Path
    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None


class Help(Exception):
    """The user asked for help, which this holds."""


def parse(argv: Sequence[str]) -> Command:
    """Reads the flags, the config file and the changes to it.

    Args:
      argv: the program's name and its arguments.

    Raises:
      UserError: a flag, the file or a field of the configuration is wrong.
      Help: --help is among the flags.
    """
    values = _flags()
    try:
        rest = values(list(argv), known_only=True)[1:]
    except flags.Error as error:
        raise UserError(_sentence(error, "see --help")) from error
    if values.help:
        raise Help(_help(values))
    if values.config is None or not values.workdir:
        raise UserError(
            "Give --config, a file such as configs/digits.py, and --workdir, the run's folder."
        )
    if "://" in values.workdir:
        raise UserError(
            f"--workdir is {values.workdir!r}, which is no folder; mount the bucket (with gcsfuse, "
            "for one) and give a path in it."
        )
    for argument in rest:
        if not argument.startswith(("--config.", "-config.", "--noconfig.", "-noconfig.")):
            raise UserError(
                f"{argument!r} is no argument of this program; write changes of the configuration "
                "as --config.FIELD=VALUE, and see --help."
            )
    config = config_lib.parse(changed(load(values.config), rest))
    return Command(
        config=config,
        workdir=program.path(values.workdir),
        coordinator_address=values.coordinator_address,
        num_processes=values.num_processes,
        process_id=values.process_id,
    )


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_string(
        "config", None, "An experiment: a file of configs/, with its argument.", flag_values=values
    )
    flags.DEFINE_string(
        "workdir", None, "The run's folder; a run that is there goes on.", flag_values=values
    )
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "Host and port of process 0, where JAX does not detect the cluster.",
        flag_values=values,
    )
    flags.DEFINE_integer("num_processes", None, "How many there are.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which of them this is.", flag_values=values)
    flags.DEFINE_boolean("help", False, "Show this.", flag_values=values)
    return values


def load(config_flag: str) -> ml_collections.ConfigDict:
    """What `get_config()` of a config file gives.

    Args:
      config_flag: a file, such as configs/digits.py; what follows its name and a colon, as in
        configs/cifar.py:resnet20,cifar100, is `get_config`'s argument.

    Raises:
      UserError: there is no such file, it raises, or it gives no mapping.
    """
    name, colon, argument = config_flag.partition(".py:")
    path, arguments = program.path(f"{name}.py" if colon else name), [argument] if colon else []
    try:
        is_file = path.is_file()
    except OSError as error:  # a name may be too long, or not ours to look up
        raise UserError(
            f"--config is {str(path)!r}, which cannot be read ({error.strerror}); give a file such "
            "as configs/digits.py."
        ) from error
    if not is_file:
        raise UserError(f"--config is {str(path)!r}, and there is no such file.")
    try:
        path.read_text(encoding="utf-8")  # Python itself lets bytes of anything pass in a comment
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise UserError(
                f"{path} defines no get_config(); add one that returns an "
                "ml_collections.ConfigDict, as those in configs/ do."
            )
        config = get_config(*arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # it is the user's code, and may raise anything
        remedy = f"correct the file or its argument, {argument!r}" if colon else "correct the file"
        raise UserError(
            f"{path} raised {type(error).__name__}{_where(error, path)}: {_sentence(error, remedy)}"
        ) from error
    if not isinstance(config, Mapping | ml_collections.ConfigDict):
        raise UserError(
            f"get_config() of {path} returned {config!r}; let it return an "
            "ml_collections.ConfigDict, as those in configs/ do."
        )
    try:
        config = ml_collections.ConfigDict(config)
        config_lib.checked_plain(config)
    except ValueError as error:  # a key has a dot
        raise UserError(f"{path}: {_sentence(error, 'rename it')}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config


def changed(
    config: ml_collections.ConfigDict, arguments: Sequence[str]
) -> ml_collections.ConfigDict:
    """`config` with the changes of arguments such as `--config.sparsity=0.9`.

    Raises:
      UserError: an argument is wrong.
    """
    values = flags.FlagValues()
    try:
        holder = config_flags.DEFINE_config_dict(
            "config",
            config,
            lock_config=False,
            accept_new_attributes=True,
            flag_values=values,
            sys_argv=["", *arguments],
        )
        values(["", *arguments])
    except flags.Error as error:
        remedy = "give a value of the type that the field has in the config file"
        raise UserError(_sentence(error, remedy)) from error
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        # ml_collections', for a path of fields.
        remedy = "see the config file and --help for the fields"
        raise UserError(f"{' '.join(arguments)}: {_sentence(error, remedy)}") from error
    return holder.value


def _where(error: BaseException, path: pathlib.Path) -> str:
    """ " in line 3", the deepest of a traceback that is in `path`."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f" in line {lines[-1]}" if lines else ""


def _sentence(error: BaseException, remedy: str) -> str:
    """A library's message on one line, with what to do."""
    message = " ".join(str(error).split()).rstrip(".") or "no reason given"
    return f"{message}; {remedy}."


def _help(values: flags.FlagValues) -> str:
    """The page of --help: the flags, and the fields of a configuration with their defaults."""
    described = [f"  --{name}: {values[name].help}" for name in values if values[name].help]
    _, _, attributes = (inspect.getdoc(Config) or "").partition("Attributes:\n")
    defaults = [
        f"{name} = {field.default!r}"
        for name, field in Config.model_fields.items()
        if not field.is_required()
    ]
    return "\n".join(
        [
            "Trains a sparse network, or goes on with a run that was stopped.",
            "",
            "  python -m train.main --config configs/digits.py --workdir runs/digits",
            "",
            "Flags:",
            *described,
            "",
            "Fields of the configuration, which --config.FIELD=VALUE changes:",
            *attributes.rstrip().splitlines(),
            "",
            *textwrap.wrap(f"Defaults: {', '.join(defaults)}.", 100),
        ]
    )

"""From a command line to a configuration.

All wrong overrides are found together, before anything starts.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.trainer.compat import PROJECTS, fates_of, translate
from verl.trainer.overrides import first_line, parse, quoted
from verl.trainer.precision import register_precision
from verl.trainer.schema import register_models
from verl.utils.config import did_you_mean
from verl.utils.errors import ConfigError
from verl.utils.places import config_folders, config_names, configs

register_models()
register_precision()
CONFIGS = configs()
HUB = "hf:"
"""The prefix of a data set of the Hugging Face hub, in keys that also accept paths."""
HELP = {"--help", "-h", "--hydra-help", "--version"}
SHOWING = HELP | {"--cfg", "-c", "--info", "-i"}


class CommandLine(NamedTuple):
    """What a user asked for, in this project's own keys."""

    config_name: str
    overrides: list[str]
    flags: list[str]
    """All other arguments; they are Hydra's."""
    multirun: bool
    """Whether each combination of values is a run of its own."""
    is_foreign: bool
    """Whether the configuration is not in configs/; then nothing can be checked beforehand."""

    @property
    def only_shows(self) -> bool:
        """Whether the user wants to see help or the composed configuration instead of a run."""
        return any(flag.partition("=")[0] in SHOWING for flag in self.flags)


def read_command_line(argv: Sequence[str], default_config: str) -> CommandLine:
    """Reads the arguments of a program that Hydra starts, with `compat=` translated.

    Raises ConfigError.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-name", "-cn", default=default_config)
    parser.add_argument("--config-path", "--config-dir", "-cp", "-cd")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--cfg", "-c")
    parser.add_argument("--package", "-p")
    parser.add_argument("--info", "-i", nargs="?")
    for names in ("--resolve", "--run -r", "--hydra-help", "--version", "--help -h"):
        parser.add_argument(*names.split(), action="store_true")
    known, overrides = parser.parse_known_args(argv)
    flags = without(argv, overrides)
    project, overrides = take_compat(overrides)
    config_name = known.config_name
    if project is not None:
        config_name, flags = own_config(known.config_name, default_config, flags)
        keys = keys_of(compose_or_say_why(config_name, ["~experiment"]))
        overrides = translate(project, overrides, known.config_name, keys)
    is_foreign = project is None and known.config_path is not None
    return CommandLine(config_name, overrides, flags, known.multirun, is_foreign)


def checked_arguments(argv: Sequence[str], default_config: str) -> list[str]:
    """Returns the arguments for Hydra. Exits with a list of all wrong overrides, if any."""
    try:
        line = read_command_line(argv, default_config)
        if not HELP & set(line.flags) and not line.is_foreign:
            check_overrides(line.config_name, line.overrides, sweeps=line.multirun)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    return [*line.flags, *own_folder(), *line.overrides]


def own_folder() -> list[str]:
    """The override by which Hydra finds the user's own configurations too, if there are any."""
    _, *own = config_folders()
    return [f"hydra.searchpath=[{quoted(f'file://{folder}')}]" for folder in own]


def without(argv: Sequence[str], taken: Sequence[str]) -> list[str]:
    """`argv` without the arguments `taken`, which are in it in the same order.

    >>> without(["-m", "a=1", "--cfg", "job", "b=2"], ["a=1", "b=2"])
    ['-m', '--cfg', 'job']
    """
    rest = list(taken)
    left = list[str]()
    for argument in argv:
        if rest and argument == rest[0]:
            rest.pop(0)
        else:
            left.append(argument)
    return left


def take_compat(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """The project that `compat=` names, and the other overrides.

    Raises ConfigError for a project that is not known.
    """
    named = [override.partition("=")[2] for override in overrides if override.startswith("compat=")]
    others = [override for override in overrides if not override.startswith("compat=")]
    if not named or named[-1] == "null":
        return None, others
    if named[-1] not in PROJECTS:
        raise ConfigError([f"compat={named[-1]}: expected {' or '.join(PROJECTS)}"])
    return named[-1], others


def own_config(name: str, default: str, flags: Sequence[str]) -> tuple[str, list[str]]:
    """The configuration of this project to start from, and the flags for Hydra.

    Flags that name a configuration of another project are left out.
    """
    foreign = ("--config-name", "--config-path", "--config-dir", "-cn", "-cp", "-cd")
    kept: list[str] = []
    skips_value = False
    for flag in flags:
        if skips_value:
            skips_value = False
        elif flag.partition("=")[0] in foreign:
            skips_value = "=" not in flag
        else:
            kept.append(flag)
    if not (CONFIGS / f"{name}.yaml").exists():
        return default, kept
    return name, [*kept, f"--config-name={name}"]


def composed(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration of a command. Raises ConfigError listing every override that is wrong."""
    check_overrides(config_name, overrides)
    return compose_or_say_why(config_name, overrides)


def as_plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as dicts and lists, links resolved.

    Raises ConfigError naming every value that is required and not given.
    """
    if missing := missing_keys(config):
        raise ConfigError([f"{key}: required, and not given: add {key}=..." for key in missing])
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([first_line(error)]) from error
    return plain


def missing_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """The keys of mandatory values (`???`) that are not set."""
    found: list[str] = []
    for key in map(str, config):
        path = f"{prefix}{key}"
        if OmegaConf.is_missing(config, key):
            found.append(path)
        elif not OmegaConf.is_interpolation(config, key):
            section = config[key]
            if isinstance(section, DictConfig):
                found += missing_keys(section, f"{path}.")
    return found


def check_overrides(config_name: str, overrides: Sequence[str], *, sweeps: bool = False) -> None:
    """Raises ConfigError listing every override whose syntax, group, choice or key is wrong.

    `sweeps`: several values for a key (`a=1,2`) are meant, as in Hydra's multirun.
    """
    if not (CONFIGS / f"{config_name}.yaml").exists():
        there = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
        raise ConfigError(
            [f"--config-name {config_name}: there is none such; expected one of {', '.join(there)}"]
        )
    parsed, problems = parse(overrides)
    choices = [override for override in parsed if is_group(override)]
    values = [override for override in parsed if not is_group(override)]
    usable: list[str] = []
    for override in choices:
        found = choice_problems(override)
        problems += found
        if not found and not override.is_sweep_override():
            usable.append(str(override.input_line))
    base = compose_or_say_why(config_name, usable)
    problems += key_problems(values, keys_of(base))
    if not sweeps:
        problems += [sweep_problem(override) for override in parsed if override.is_sweep_override()]
    if problems:
        raise ConfigError(problems)


def is_group(override: Override) -> bool:
    """Whether an override chooses a file of configs/, or concerns Hydra itself."""
    name = override.key_or_group
    return name == "hydra" or name.startswith(("hydra.", "hydra/")) or is_folder(name)


def is_folder(name: str) -> bool:
    """Whether there is a folder of configurations of that name."""
    return any((folder / name).is_dir() for folder in config_folders())


def choice_problems(override: Override) -> list[str]:
    """What is wrong with the choice of a file: `experiment=NAME`."""
    group = override.key_or_group
    chosen = override.value()
    if (
        override.is_delete()
        or override.is_sweep_override()
        or group.startswith("hydra")
        or chosen is None
    ):
        return []
    there = config_names(group)
    names = chosen if isinstance(chosen, list) else [chosen]
    problems: list[str] = []
    for name in (str(name).removesuffix(".yaml") for name in names):
        if name not in there:
            hint = did_you_mean(name, there) or f": expected one of {there}"
            problems.append(f"{group}={name}: configs/{group} has no such file{hint}")
    return problems


def key_problems(overrides: Sequence[Override], known: frozenset[str]) -> list[str]:
    """Overrides of keys that do not exist, and additions of keys that do."""
    added: set[str] = set()
    problems: list[str] = []
    for override in overrides:
        key = override.key_or_group.partition("[")[0]
        exists = key in known or any(key == new or key.startswith(f"{new}.") for new in added)
        if override.is_add() and key in known and not isinstance(override.value(), dict | list):
            problems.append(f"+{key}: the key exists: leave out the +")
        elif override.is_add() or override.is_force_add():
            added.add(key)
        elif not exists:
            problems.append(unknown_key(key, known))
        elif replaces_section(override, known):
            problems.append(f"{override.input_line}: expected a section of keys")
    return problems


def replaces_section(override: Override, known: Iterable[str]) -> bool:
    """Whether an override gives a single value for a whole section of keys."""
    value = override.value()
    if value is None or isinstance(value, dict) or "${" in str(value):
        return False
    return any(key.startswith(f"{override.key_or_group}.") for key in known)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message about a key that does not exist.

    It says how the key is translated if it is one of another project, else it names the nearest key
    of this project.
    """
    for project, became in fates_of(key).items():
        return f"{key}: {became} (compat={project} translates a whole command line)"
    return f"{key}: there is no such key{did_you_mean(key, known)}"


def sweep_problem(override: Override) -> str:
    """The message about several values where one is expected."""
    key, _, text = str(override.input_line).partition("=")
    return f"{key}={text}: several values; a list is written [{text}], a text with commas in quotes"


def compose_or_say_why(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration as Hydra composes it. Raises ConfigError with Hydra's first line."""
    try:
        with initialize_config_dir(str(CONFIGS), version_base=None):
            return compose(config_name, [*own_folder(), *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([first_line(error)]) from error


def keys_of(config: DictConfig) -> frozenset[str]:
    """All dotted keys of a configuration, those of sections too."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    return frozenset(dotted(plain, ""))


def dotted(section: Mapping[str, Any], prefix: str) -> Iterable[str]:
    """The keys under a section, each with `prefix` before it."""
    for name, value in section.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{name}.")


def absolute(
    overrides: Sequence[str], folder: Path, paths: Iterable[str], models: Iterable[str]
) -> list[str]:
    """The overrides with relative paths made absolute; they are relative to `folder`.

    `paths`: keys whose values are paths. `models`: keys whose values are paths or names of the hub;
    such a value is taken for a path if it exists in `folder`.
    """
    return [with_full_path(text, folder, frozenset(paths), frozenset(models)) for text in overrides]


def with_full_path(text: str, folder: Path, paths: frozenset[str], models: frozenset[str]) -> str:
    """One override with its path, if it has one, made absolute."""
    parsed, _ = parse([text])
    if not parsed or parsed[0].is_delete() or parsed[0].is_sweep_override():
        return text
    key = parsed[0].key_or_group
    value = parsed[0].value()
    is_local = False
    if isinstance(value, str) and value:
        is_local = (folder / Path(value).expanduser()).exists()
    if (key in paths and value) or (key in models and is_local):
        return f"{text.partition('=')[0]}={resolved(value, folder)}"
    return text


def resolved(value: object, folder: Path) -> str:
    """A path, or a list of paths, made absolute and written as the value of an override.

    Interpolations and names of the hub stay as they are.
    """
    if isinstance(value, list):
        return f"[{','.join(resolved(entry, folder) for entry in value)}]"
    text = str(value)
    stays = "${" in text or text.startswith(HUB)
    return quoted(text if stays else str((folder / Path(text).expanduser()).resolve()))

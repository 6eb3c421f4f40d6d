"""`label_steps`: the data, the models, the chunks of this process."""

import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import tqdm
from transformers import AutoTokenizer, set_seed

from ..trainers.input_checks import require_columns, require_eos, require_texts
from ..trainers.places import load_rows
from .answers import AnswerSampler, Labeller, Totals, prompt_ids
from .config import LabelStepsConfig, SamplingConfig
from .folder import LabelFolder
from .sampling import SAMPLERS, Source

Folder = TypeVar("Folder", bound=LabelFolder)
_WRITTEN = ("completions", "labels", "outcome")  # columns that are added
_GIVEN = ("prompts", "trainer_state", "log_extra", "log_metric")  # other names that the verifier is given


def label_steps(config: LabelStepsConfig) -> Totals:
    """
    Samples answers, labels their steps and writes them to `config.output_dir`, as far as they are not there. Several
    processes share the chunks by rank; the bytes that are written do not depend on how many there are.

    Args:
        config ([`LabelStepsConfig`]):
            Options.

    Returns:
        [`Totals`]: What this process did now.

    Raises:
        `ValueError`: If data, models or what is in the folder do not fit.
    """
    models = [config.model_name_or_path, *filter(None, [config.completer])]

    def make(tokenizer: Any, samplers: list) -> Labeller:
        return Labeller(config, tokenizer, samplers[0], samplers[-1])

    folder, totals = work_through(config, models, LabelFolder, make)
    if folder.join():
        print(f"Labelled answers to {len(folder.rows)} prompts: {folder.joined_file}", file=sys.stderr)
    return totals


def work_through(
    config: SamplingConfig,
    models: list[str],
    folder_class: type[Folder],
    make: Callable[[Any, list[Any]], AnswerSampler],
) -> tuple[Folder, Totals]:
    """
    Gives the missing chunks of this process to a worker, and writes what it makes of them.

    Args:
        config ([`SamplingConfig`]):
            Options.
        models (`list[str]`):
            The models to sample, the policy first; all with its vocabulary.
        folder_class (`type`):
            [`LabelFolder`], or a class below it.
        make (`Callable`):
            `(tokenizer, samplers)` to the worker, which is called with the rows of a chunk. Only where work is left.

    Returns:
        `tuple[LabelFolder, Totals]`: The folder, not joined, and what this process did now.
    """
    state = PartialState()
    if config.backend == "vllm" and state.num_processes > 1:
        raise ValueError(f"backend='vllm' runs in one process, which uses all it is given, got {state.num_processes}.")
    rows = read_rows(config)
    tokenizer, sources = _tokenizer_and_sources(config, models)
    _refuse_long_prompts(rows, tokenizer, sources, config)
    folder = folder_class(config, rows)
    own = range(state.process_index, folder.num_chunks, state.num_processes)
    todo = [chunk for chunk in folder.missing() if chunk in own]
    totals = Totals()
    if todo:
        samplers = [SAMPLERS[config.backend](source, config, 1 / len(sources)) for source in sources]
        worker = make(tokenizer, samplers)
        totals, begun = worker.totals, time.perf_counter()
        bar = tqdm(todo, desc="chunks", total=len(own), initial=len(own) - len(todo))
        for chunk in bar:
            # Chunks are independent of each other: which were done before, or elsewhere, makes no difference.
            set_seed(random.Random(f"{config.seed} {chunk}").randrange(2**31))
            folder.write(chunk, worker(folder.rows_of(chunk)))
            speed = sum(sampler.tokens for sampler in samplers) / (time.perf_counter() - begun)
            wrong = totals.answers - totals.right
            bar.set_postfix_str(f"{totals.right} right, {wrong} wrong, {speed:.0f} tokens/s")
    return folder, totals


def read_rows(config: SamplingConfig) -> list[dict[str, Any]]:
    """The first `limit` rows of the data."""
    dataset = load_rows(config.dataset_name, config.dataset_config, config.dataset_train_split)
    require_columns(dataset, "The data set", ["prompt"])
    for names, why in ((_WRITTEN, "of a column that is written"), (_GIVEN, "under which the verifier is given more")):
        for column in names:
            if column in dataset.column_names:
                raise ValueError(f"The data set has a column {column!r}, the name {why}. Rename the column.")
    dataset = dataset.select(range(min(config.limit or len(dataset), len(dataset))))
    require_texts(dataset, "The data set", ["prompt"])
    rows = dataset.to_list()
    if not rows:
        raise ValueError(f"{config.dataset_name} has no row in its split {config.dataset_train_split!r}.")
    for i, row in enumerate(rows):
        contents = [message.get("content") for message in row["prompt"]] if isinstance(row["prompt"], list) else []
        if any(block.get("type") != "text" for content in contents if isinstance(content, list) for block in content):
            raise ValueError(f"The prompt of row {i} of the data set holds more than text. Remove the row.")
        try:
            json.dumps(row, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Row {i} of the data set cannot be written as JSON: {error}. Remove the column."
            ) from error
    return rows


def _tokenizer_and_sources(config: SamplingConfig, names: list[str]) -> tuple[Any, list[Source]]:
    """The policy's tokenizer, and the models: the policy, and the completer if it is another one."""
    tokenizers = [AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code) for name in names]
    require_eos(tokenizers[0])
    if tokenizers[0].get_vocab() != tokenizers[-1].get_vocab():
        raise ValueError("completer has another vocabulary than model; its rollouts would start from other text.")
    return tokenizers[0], [Source.of(name, tokenizers, config.trust_remote_code) for name in names]


def _refuse_long_prompts(rows: list, tokenizer: Any, sources: list[Source], config: SamplingConfig) -> None:
    known = [source.positions for source in sources if source.positions is not None]
    for i, row in enumerate(rows):
        length = len(prompt_ids(row["prompt"], tokenizer, config.chat_template_kwargs))
        if not length:
            raise ValueError(f"The prompt of row {i} of the data set is no token. Remove the row.")
        if known and length + config.max_completion_length > min(known):
            raise ValueError(
                f"The prompt of row {i} of the data set has {length} tokens, which with max_completion_length="
                f"{config.max_completion_length} is more than the {min(known)} that the model knows. Remove the row, "
                "or lower max_completion_length."
            )

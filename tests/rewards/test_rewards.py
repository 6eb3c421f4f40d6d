"""Process-reward models: tiny models of each structure, scored once more by hand, one step at a time."""

import json
from pathlib import Path

import pytest
import torch
from tiny import logged
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForTokenClassification,
)

from recipes.clock import task
from trl_ext.rewards import ProcessRewardModel
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

OURS = (GRPOTrainer, GRPOConfig)
CLOCK = Path(task.__file__).parent / "model"
PROMPTS = ["4 a+3 b-5:", "8 a+5:", "1 a+1:"]
STEPS = [["a4+3=7\n", "b7-5=2\n\n", "#2"], ["a8+5=3\n"], []]
TEXTS = [["a4+3=7", "b7-5=2", "#2"], ["a8+5=3"], []]

REMOTE_CODE = """
import torch
from transformers import Qwen3Model, Qwen3PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput


class Qwen3ForProcessRewardModel(Qwen3PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = Qwen3Model(config)
        width = config.hidden_size
        self.score = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return TokenClassifierOutput(logits=self.score(hidden))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(kind, num_labels=2)`: folder of a tiny random model of that structure."""

    def save(kind, num_labels=2):
        folder = tmp_path_factory.mktemp(kind)
        tokenizer = AutoTokenizer.from_pretrained(CLOCK)
        tokenizer.add_tokens(["<extra_0>"], special_tokens=True)
        tokenizer.add_tokens(["ки"])
        if kind in ("token_classifier", "good_bad"):
            tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
        torch.manual_seed(1)
        if kind in ("good_bad", "chat"):
            model = AutoModelForCausalLM.from_pretrained(CLOCK)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        else:
            config = Qwen3Config.from_pretrained(CLOCK)
            config.vocab_size, config.num_labels, config.initializer_range = len(tokenizer), num_labels, 0.5
            model = Qwen3ForTokenClassification(config)
        model.save_pretrained(folder)
        if kind == "remote":
            scope = {}
            exec(REMOTE_CODE, scope)
            scope["Qwen3ForProcessRewardModel"](config).save_pretrained(folder)
            (folder / "modeling_prm.py").write_text(REMOTE_CODE)
            written = json.loads((folder / "config.json").read_text())
            written["auto_map"] = {"AutoModel": "modeling_prm.Qwen3ForProcessRewardModel"}
            (folder / "config.json").write_text(json.dumps(written))
        return str(folder)

    return save


def good(model, ids, answers=None):
    """P(good) after the last of these ids, from a pass over them alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    logits = logits[answers] if answers else logits
    return logits.softmax(-1)[1].item() if len(logits) > 1 else logits.sigmoid().item()


def assert_scores(actual, expected):
    assert [len(row) for row in actual] == [len(row) for row in expected]
    for row, values in zip(actual, expected, strict=True):
        assert row == pytest.approx(values, abs=1e-5)
    flat = [value for row in expected for value in row]
    assert max(flat) - min(flat) > 1e-3, "otherwise any place would do"


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_token_classifier_is_read_at_the_last_token_of_the_separator(saved, num_labels):
    folder = saved("token_classifier", num_labels)
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = []
    for prompt, steps in zip(PROMPTS, TEXTS, strict=True):
        ids, row = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]], []
        for step in steps:
            ids = ids + tokenizer(step + "\n", add_special_tokens=False)["input_ids"]
            row.append(good(model, ids))
        expected.append(row)
    prm = ProcessRewardModel(folder, "token_classifier", batch_size=2)
    assert_scores(prm(prompts=PROMPTS, completion_steps=STEPS), expected)
    both = ProcessRewardModel(folder, "token_classifier", score="difference")(prompts=PROMPTS, completion_steps=STEPS)
    assert_scores(both, [[2 * value - 1 for value in row] for row in expected])


@pytest.mark.parametrize("kind", ["marker", "remote"])
def test_a_marker_model_is_read_at_its_marker_behind_the_chat_template(saved, kind):
    folder = saved(kind)
    prm = ProcessRewardModel(folder, "marker", system_prompt="1+1", trust_remote_code=kind == "remote")
    prm.load()
    assert type(prm.model).__name__ == {"marker": "Qwen3ForTokenClassification"}.get(
        kind, "Qwen3ForProcessRewardModel"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for prompt, steps in zip(PROMPTS, TEXTS, strict=True):
        row = []
        for j in range(len(steps)):
            text = "".join(step + "<extra_0>" for step in steps[: j + 1])
            text = f"<bos><|system|>1+1<|user|>{prompt}<|assistant|>{text}"
            row.append(good(prm.model, tokenizer(text, add_special_tokens=False)["input_ids"]))
        expected.append(row)
    assert_scores(prm(prompts=PROMPTS, completion_steps=STEPS), expected)
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert_scores(prm(prompts=conversations, completion_steps=STEPS), expected)


def test_code_of_a_repository_runs_only_if_it_is_trusted(saved):
    with pytest.raises(ValueError, match="trust_remote_code"):
        ProcessRewardModel(saved("remote"), "marker").load()


def test_a_language_model_answers_good_or_bad_at_the_marker(saved):
    folder = saved("good_bad")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = [tokenizer.convert_tokens_to_ids(answer) for answer in "-+"]
    expected = []
    for prompt, steps in zip(PROMPTS, TEXTS, strict=True):
        row = []
        for j in range(len(steps)):
            text = f"{prompt} " + " ки\n".join(steps[: j + 1]) + " ки"
            row.append(good(model, tokenizer(text)["input_ids"], answers))
        expected.append(row)
    assert_scores(ProcessRewardModel(folder, "good_bad")(prompts=PROMPTS, completion_steps=STEPS), expected)


def test_a_chat_model_answers_each_step_in_its_own_turn(saved):
    folder = saved("chat")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = [tokenizer.convert_tokens_to_ids(answer) for answer in "-+"]
    expected = []
    for prompt, steps in zip(PROMPTS, TEXTS, strict=True):
        text, row = f"<bos><|user|>{prompt} ", []
        for step in steps:
            text += f"{step}<|assistant|>"
            row.append(good(model, tokenizer(text, add_special_tokens=False)["input_ids"], answers))
            text += "+<eos><|user|>"
        expected.append(row)
    assert_scores(ProcessRewardModel(folder, "chat")(prompts=PROMPTS, completion_steps=STEPS), expected)


# Templates as those of Qwen3 (empty thoughts before the last answer alone) and DeepSeek-R1's distilled models (the
# prompt for an answer opens thoughts, an answer has none), in the tokens of the clock model.
UNSTABLE = {
    "Qwen3": """{{- bos_token }}{%- for m in messages %}{{- '<|' + m.role + '|>' }}{%- if m.role == 'assistant' %}
{%- if loop.last %}{{- '##' }}{%- endif %}{{- m.content + eos_token }}{%- else %}{{- m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}""",
    "DeepSeek-R1": """{{- bos_token }}{%- for m in messages %}{{- '<|' + m.role + '|>' + m.content }}
{%- if m.role == 'assistant' %}{{- eos_token }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>##' }}{%- endif %}""",
}


@pytest.mark.parametrize("template", UNSTABLE)
def test_a_chat_template_that_writes_the_answer_elsewhere_is_refused(saved, template):
    prm = ProcessRewardModel(saved("chat"), "chat")
    prm.load()
    prm.tokenizer.chat_template = UNSTABLE[template]
    name = prm.__name__
    with pytest.raises(ValueError, match=rf"The chat template of '{name}' does not write the answer to step \d where"):
        prm(prompts=PROMPTS, completion_steps=STEPS)


@pytest.mark.parametrize("kind", ["token_classifier", "marker", "good_bad", "chat"])
def test_blocks_of_text_are_read_as_their_text(saved, kind):
    prm = ProcessRewardModel(saved(kind), kind)
    plain = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    blocks = [
        [{"role": "user", "content": [{"type": "text", "text": p[:3]}, {"type": "text", "text": p[3:]}]}]
        for p in PROMPTS
    ]
    expected = prm(prompts=plain, completion_steps=STEPS)
    assert prm(prompts=blocks, completion_steps=STEPS) == expected == prm(prompts=PROMPTS, completion_steps=STEPS)
    blocks[0][0]["content"].append({"type": "image"})
    with pytest.raises(ValueError, match=r"reads text alone, but the prompt holds blocks of \['image', 'text'\]"):
        prm(prompts=blocks, completion_steps=STEPS)


@pytest.mark.parametrize("kind", ["good_bad", "chat"])
def test_a_language_model_makes_logits_only_where_a_score_is_read(saved, kind):
    prm = ProcessRewardModel(saved(kind), kind)
    prm.load()
    sizes = []
    prm.model.get_output_embeddings().register_forward_hook(lambda module, args, output: sizes.append(output.shape))
    prm(prompts=PROMPTS, completion_steps=STEPS)
    assert sizes == [(1, 4, prm.model.config.vocab_size)], "four steps, and not every token of the batch"
    assert not prm.model.get_output_embeddings()._forward_pre_hooks


def test_a_batch_of_steps_beyond_the_largest_length_has_no_score(saved):
    prm = ProcessRewardModel(saved("good_bad"), "good_bad", max_length=2)
    assert prm(prompts=PROMPTS, completion_steps=STEPS) == [[None] * 3, [None], []]


def test_a_marker_that_the_policy_wrote_itself_moves_nothing(saved):
    prm = ProcessRewardModel(saved("marker"), "marker")
    (honest,) = prm(prompts=PROMPTS[:1], completion_steps=[["a4+3=7\n", "#7"]])
    (cheating,) = prm(prompts=PROMPTS[:1], completion_steps=[["a4+3=7\n", "<extra_0>#7<extra_0>"]])
    assert len(cheating) == 2 and cheating[0] == pytest.approx(honest[0], abs=1e-6)


def test_steps_beyond_the_largest_length_are_not_scored(saved):
    folder = saved("token_classifier")
    whole = ProcessRewardModel(folder, "token_classifier")(prompts=PROMPTS, completion_steps=STEPS)
    cut = ProcessRewardModel(folder, "token_classifier", max_length=20)(prompts=PROMPTS, completion_steps=STEPS)
    assert cut == [[pytest.approx(whole[0][0], abs=1e-6), None, None], [pytest.approx(whole[1][0], abs=1e-6)], []]


def test_four_bit_weights_score_nearly_the_same(saved):
    pytest.importorskip("bitsandbytes")
    folder = saved("token_classifier")
    whole = ProcessRewardModel(folder, "token_classifier")(prompts=PROMPTS, completion_steps=STEPS)
    prm = ProcessRewardModel(folder, "token_classifier", load_in_4bit=True)
    quantised = prm(prompts=PROMPTS, completion_steps=STEPS)
    assert type(prm.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    differences = [abs(a - b) for x, y in zip(whole, quantised, strict=True) for a, b in zip(x, y, strict=True)]
    assert 0.0 < max(differences) < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "value"}, "kind must be one of ['chat', 'good_bad', 'marker', 'token_classifier'], got 'value'."),
        (
            {"kind": "marker", "score": "logit"},
            "score must be one of ['probability', 'difference', 'value'], got 'logit'.",
        ),
        ({"kind": "chat", "separator": "\n"}, "separator must be left out for 'chat'."),
        ({"kind": "marker", "separator": ""}, "separator must be a text for 'marker'."),
        ({"kind": "good_bad", "separator": " ки\\n"}, "separator holds a backslash and a letter where a control"),
        ({"kind": "marker", "batch_size": 0}, "batch_size must be a positive whole number, got 0."),
        ({"kind": "marker", "maximum": 1}, "process_reward_model has no 'maximum'; it takes ['bad', 'batch_size',"),
        ({}, "'none/such' has no process_reward_model.json that says what kind it is; give kind, one of ['chat',"),
        ({"model": None}, "process_reward_model needs 'model', a folder or a model id."),
        ({"kind": "marker", "good": "+"}, "good and bad are answers of ('good_bad', 'chat'); kind='marker' has"),
        ({"kind": "good_bad", "system_prompt": "1"}, "system_prompt is read by 'marker' and 'chat', whose text is a"),
        ({"kind": "chat", "score": "value"}, "objective='regression' needs an output of its own; kind='chat' has"),
    ],
)
def test_options_are_checked_before_a_model_loads(options, message):
    with pytest.raises(ValueError) as error:
        GRPOConfig(
            "out", bf16=False, use_cpu=True, report_to="none", process_reward_model={"model": "none/such", **options}
        )
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("estimator", [None, "group_mean"])
def test_a_process_reward_model_needs_an_estimator_that_takes_steps(estimator):
    options = {"model": "none/such", "kind": "marker"}
    with pytest.raises(ValueError, match="process_reward_model gives one reward per step, which advantage_estimator="):
        GRPOConfig("out", bf16=False, use_cpu=True, process_reward_model=options, advantage_estimator=estimator)


def test_a_model_with_other_outputs_is_refused(saved):
    with pytest.raises(ValueError, match="has 3 outputs per token; kind='marker' needs 2"):
        ProcessRewardModel(saved("marker", 3), "marker")(prompts=PROMPTS, completion_steps=STEPS)


def test_the_trainer_takes_the_model_from_its_config(train, saved):
    folder = saved("token_classifier")
    options = {"advantage_estimator": "process_group_relative", "step_separator": "b", "max_steps": 2}
    options["process_reward_model"] = {"model": folder, "kind": "token_classifier"}
    name = Path(folder).name
    trainer = train(*OURS, **options)
    assert trainer.reward_func_names == ["digits", name]
    entry = logged(trainer)[0]
    assert 0.0 < entry[f"rewards/{name}/mean"] < 1.0 and 0.0 < entry["process/advantage_share"] < 1.0
    alone = train(*OURS, reward_funcs=None, **options)
    assert alone.reward_func_names == [name] and logged(alone)[0]["process/advantage_share"] == 1.0

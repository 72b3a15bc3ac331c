"""What a plan says of layers with a sliding window: that all slide, so that there is nothing to extend, or some do."""

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, MistralConfig

import rope_dist
from rope_dist import export
from rope_dist.cli import main
from rope_dist.layer_types import WINDOW_OF_ALL_LAYERS, attention_window

SMALL = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW, LENGTH = 8, 32
QWEN = {"use_sliding_window": True, "sliding_window": WINDOW}
CASES = [
    ("mistral", {"sliding_window": WINDOW}, True),
    ("mistral", {"sliding_window": None}, False),
    ("mixtral", {"sliding_window": WINDOW, "num_local_experts": 2}, True),
    ("phi3", {"sliding_window": WINDOW}, True),
    ("phi3", {}, False),
    ("starcoder2", {"sliding_window": WINDOW}, True),
    ("qwen2", {**QWEN, "max_window_layers": 0}, True),
    ("qwen2", {**QWEN, "max_window_layers": 1}, False),
    ("qwen2", {**QWEN, "max_window_layers": 2}, False),
    ("qwen2", {**QWEN, "use_sliding_window": False, "max_window_layers": 0}, False),
    ("qwen3", {**QWEN, "max_window_layers": 0, "head_dim": 16}, True),
    ("gemma2", {"layer_types": ["sliding_attention"] * 2, "sliding_window": WINDOW, "head_dim": 16}, True),
    ("gemma2", {"sliding_window": WINDOW, "head_dim": 16}, False),
    ("llama", {"sliding_window": WINDOW}, False),
]


def small(kind, changes):
    return AutoConfig.for_model(kind, **{**SMALL, **changes})


def warned(function, *arguments, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = function(*arguments, **options)
    return value, [str(w.message) for w in caught if "every attention layer" in str(w.message)]


@pytest.mark.parametrize(("kind", "changes", "slides"), CASES)
def test_a_plan_warns_where_no_layer_sees_further_than_its_window(kind, changes, slides):
    """Whether one does is tried: two layers pass the first token on by at most two windows."""
    config = small(kind, changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(3, 32, (1, LENGTH))
    other = ids.clone()
    other[0, 0] = 3 + (ids[0, 0] - 2) % 29
    with torch.no_grad():
        unseen = torch.equal(model(ids).logits[0, 2 * WINDOW :], model(other).logits[0, 2 * WINDOW :])
    assert unseen == slides
    plan, said = warned(rope_dist.plan, config, factor=2)
    assert len(said) == slides
    assert [note for note in plan.notes if "every attention layer" in note] == said
    if slides:
        assert f"the last {WINDOW} tokens only (sliding_window), and was trained to read 32" in said[0]
        assert said[0] in plan.summary()


def test_types_whose_layers_all_have_the_window_are_those_of_transformers():
    """Their own files choose one mask for all layers by ``sliding_window``."""
    folder = Path(transformers.__file__).parent / "models"
    choice = "create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask"
    files = {file.parent.name: " ".join(file.read_text().split()) for file in folder.glob("*/modeling_*.py")}
    found = {name for name, text in files.items() if choice in text}
    # The parts of BLT have windows and rotary embeddings of their own: no plan extends it.
    folders = {name: name.removesuffix("_text") for name in WINDOW_OF_ALL_LAYERS}
    # An older version of transformers has fewer of them.
    assert {name for name in folders.values() if name in files} == found - {"blt"}


@pytest.mark.parametrize(
    ("window", "target", "said"),
    [
        (4096, 65536, "there is nothing to extend: .* 4096 tokens only .* was trained to read 32768"),
        (32768, 65536, "there is nothing to extend"),
        (49152, 65536, "a plan for 49152 tokens has every distance that a text of 65536 has"),
        (65536, 65536, None),
        (131072, 65536, None),
        (4096, 32768, None),
    ],
)
def test_the_window_is_compared_with_both_lengths(window, target, said):
    config = MistralConfig(max_position_embeddings=32768, sliding_window=window, num_hidden_layers=1)
    if said is None:
        _, none = warned(rope_dist.plan, config, target_length=target)
        assert none == []
        return
    with pytest.warns(UserWarning, match=said):
        rope_dist.plan(config, target_length=target)


class TestWhereItIsSaid:
    @pytest.fixture
    def config(self):
        return small("mistral", {"sliding_window": WINDOW})

    @pytest.mark.parametrize("dynamic", [None, False])
    def test_enable(self, config, dynamic):
        model = AutoModelForCausalLM.from_config(config)
        _, said = warned(rope_dist.enable, model, factor=2, dynamic=dynamic)
        assert len(said) == 1

    def test_a_plan_of_something_else(self, config, tmp_path):
        """Numbers do not tell of a window, the model that the plan is applied to does."""
        theta = config.rope_parameters["rope_theta"]
        plan, said = warned(
            rope_dist.plan, theta=theta, head_dim=16, original_length=LENGTH, target_length=2 * LENGTH
        )
        assert said == []
        model = AutoModelForCausalLM.from_config(config)
        _, said = warned(export.hf, model, plan, tmp_path / "out")
        assert len(said) == 1
        _, said = warned(rope_dist.enable, model, plan=plan)
        assert len(said) == 1

    def test_once(self, config, tmp_path):
        """A plan that says so already is applied and exported without another warning."""
        model = AutoModelForCausalLM.from_config(config)
        plan, _ = warned(rope_dist.plan, config, factor=2)
        assert warned(export.hf, model, plan, tmp_path / "out")[1] == []
        assert warned(rope_dist.enable, model, plan=plan)[1] == []

    def test_command_line(self, config, tmp_path, capsys):
        config.save_pretrained(tmp_path)
        model, plan = str(tmp_path), str(tmp_path / "plan.json")
        note = f"every attention layer of MistralConfig sees the last {WINDOW} tokens only"
        with pytest.warns(UserWarning, match=note):
            assert main(["plan", model, "--factor", "2", "-o", plan]) == 0
        assert note in capsys.readouterr().out
        with pytest.warns(UserWarning, match=note):
            assert main(["compare", model, "--target", "64", "128", "--strategies", "pi", "yarn"]) == 0
        assert capsys.readouterr().out.count(note) == 1
        assert main(["export", "flags", "vllm", model, "--plan", plan]) == 0
        assert note in capsys.readouterr().err


class TestLayersOfBothKinds:
    def test_sliding_layers_that_keep_their_frequencies(self):
        plan = rope_dist.plan(Gemma3TextConfig(num_hidden_layers=6), factor=2)
        note = "only full_attention layers are extended: sliding_attention layers keep their own frequencies"
        assert plan.notes == (note,)
        assert note in plan.summary()
        dynamic = rope_dist.dynamic_plan(Gemma3TextConfig(num_hidden_layers=6), factor=2)
        assert note in dynamic.summary()

    def test_what_the_notes_say_is_what_stock_computes(self):
        gemma3 = Gemma3TextConfig(**{**SMALL, "head_dim": 16, "num_hidden_layers": 6})
        model = AutoModelForCausalLM.from_config(gemma3)
        rotary = model.model.rotary_emb
        sliding, full = rotary.sliding_attention_inv_freq.clone(), rotary.full_attention_inv_freq.clone()
        rope_dist.enable(model, factor=2, dynamic=False)
        assert torch.equal(model.model.rotary_emb.sliding_attention_inv_freq, sliding)
        assert not torch.equal(model.model.rotary_emb.full_attention_inv_freq, full)

    def test_sliding_layers_that_share_the_frequencies(self):
        plan = rope_dist.plan(small("gemma2", {"sliding_window": WINDOW, "head_dim": 16}), factor=2)
        (note,) = plan.notes
        assert (
            note == "sliding_attention layers share the frequencies of the others, and are extended with them"
        )

    def test_full_layers_alone(self):
        config = Gemma3TextConfig(num_hidden_layers=2, layer_types=["full_attention"] * 2)
        assert rope_dist.plan(config, factor=2).notes == ()
        assert attention_window(config) is None

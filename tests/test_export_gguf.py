"""GGUF with the plan's factors: every other byte as before, and llama.cpp computes what the enabled model computes."""

import errno
import os
import tracemalloc
from random import Random

import pytest
import torch
from helpers.exports import LlamaCpp, write_gguf

import rope_dist
from rope_dist import export
from rope_dist.cli import main
from rope_dist.export.gguf_reading import read

FACTORS = "rope_freqs.weight"
gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'rope-dist[export]'")


@pytest.fixture
def model(make_llama):
    return make_llama(initializer_range=0.3)


@pytest.fixture
def source(model, tmp_path):
    return write_gguf(model, tmp_path / "model.gguf")


@pytest.fixture
def plan(model):
    return rope_dist.plan(model, factor=2, strategy="dprope")


def trained_with_yarn(make_llama, tmp_path, factor, **fields):
    """A model from 64 tokens to ``factor`` times that by YaRN, and its GGUF as converters write it."""
    rope = {
        "rope_type": "yarn",
        "factor": factor,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
    }
    model = make_llama(initializer_range=0.3, max_position_embeddings=int(64 * factor), rope_parameters=rope)
    kinds = gguf.GGUFValueType
    source = write_gguf(
        model,
        tmp_path / "model.gguf",
        llama__rope__scaling__type=("yarn", kinds.STRING),
        llama__rope__scaling__factor=(factor, kinds.FLOAT32),
        llama__rope__scaling__original_context_length=(64, kinds.UINT32),
        **fields,
    )
    return model, source


def tensors(path):
    return {
        t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in gguf.GGUFReader(path).tensors
    }


def fields(path):
    found = gguf.GGUFReader(path).fields
    return {k: (v.types, v.contents()) for k, v in found.items() if not k.startswith("GGUF.")}


class TestFile:
    @pytest.mark.parametrize("strategy", ["dprope", "auto", "llama3"])
    def test_only_the_rope_changes(self, source, model, tmp_path, strategy):
        plan = rope_dist.plan(model, factor=2, strategy=strategy)
        out = export.gguf(source, plan, tmp_path / "out.gguf")
        before, after = tensors(source), tensors(out)
        factors = after.pop(FACTORS)
        assert after == before
        assert factors[2] == torch.tensor(plan.factors).numpy().tobytes()
        old, new = fields(source), fields(out)
        changed = {k for k in {*old, *new} if old.get(k) != new.get(k)}
        scaled = {"llama.rope.scaling.attn_factor"} if strategy == "auto" else set()
        ours = {"rope_dist.version", "rope_dist.strategy", "rope_dist.original_length"}
        assert changed == {"llama.context_length", *ours, *scaled}
        assert new["llama.context_length"][1] == 128
        assert export.verify(out, plan)

    def test_the_command_line(self, source, plan, tmp_path, capsys):
        plan.save(tmp_path / "plan.json")
        arguments = ("export", "gguf", source, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out.gguf")
        assert main([str(a) for a in arguments]) == 0
        assert "as planned" in capsys.readouterr().out
        assert main(["verify", str(tmp_path / "out.gguf"), "--plan", str(tmp_path / "plan.json")]) == 0
        assert tensors(tmp_path / "out.gguf")[FACTORS]

    def test_one_command_plans_from_the_file(self, source, model, tmp_path, capsys):
        out = tmp_path / "out.gguf"
        options = ("--target", "128", "--strategy", "yarn", "-o", str(out))
        assert main(["export", "gguf", str(source), *options]) == 0
        assert export.verify(out, rope_dist.plan(model, factor=2, strategy="yarn"))
        capsys.readouterr()
        # What that wrote does not say what it was trained with.
        assert main(["export", "gguf", str(out), "--factor", "2", "-o", str(tmp_path / "more.gguf")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("rope-dist: error: ")
        assert "is scaled already" in error
        assert not (tmp_path / "more.gguf").exists()

    def test_twice_is_once(self, source, plan, tmp_path):
        first = export.gguf(source, plan, tmp_path / "1.gguf")
        second = export.gguf(first, plan, tmp_path / "2.gguf")
        assert second.read_bytes() == first.read_bytes()

    def test_a_file_that_is_scaled_already(self, make_llama, tmp_path):
        """Linear scaling in the metadata becomes part of the factors, and its key goes."""
        model = make_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
        source = write_gguf(
            model,
            tmp_path / "model.gguf",
            llama__rope__scaling__type=("linear", gguf.GGUFValueType.STRING),
            llama__rope__scaling__factor=(2.0, gguf.GGUFValueType.FLOAT32),
        )
        plan = rope_dist.plan(model, factor=2, strategy="dprope")
        out = export.gguf(source, plan, tmp_path / "out.gguf")
        assert "llama.rope.scaling.factor" not in fields(out)
        assert export.verify(out, plan)

    @pytest.mark.parametrize("factor", [2.0, 4.0])
    def test_a_model_trained_with_yarn(self, make_llama, tmp_path, factor):
        """The reference is transformers' own YaRN; llama.cpp's is the same, with the scaling in its graph."""
        model, source = trained_with_yarn(make_llama, tmp_path, factor)
        stock = model.model.rotary_emb
        found = read(source).engine_config()
        torch.testing.assert_close(found.inv_freq, stock.inv_freq, rtol=1e-6, atol=0)
        assert 0 < (found.inv_freq < 0.99 * read(source).theta ** -(torch.arange(0, 16, 2) / 16)).sum() < 8
        assert found.attention_scaling == pytest.approx(stock.attention_scaling, rel=1e-6)
        plan = rope_dist.plan(model, factor=2, strategy="dprope")
        out = export.gguf(source, plan, tmp_path / "out.gguf")
        assert not [key for key in fields(out) if key.startswith("llama.rope.scaling.") and "attn" not in key]
        assert export.verify(out, plan)
        after = read(out).engine_config()
        assert after.attention_scaling == pytest.approx(plan.attention_scaling, rel=1e-6)
        assert after.attention_scaling == pytest.approx(stock.attention_scaling, rel=1e-6)

    @pytest.mark.parametrize("planned", [64, 256])
    def test_a_context_length_of_before_the_scaling(self, make_llama, tmp_path, planned):
        """Qwen2.5 with YaRN keeps 32768 and reads 4 times as much; its converter copies the 32768."""
        model, source = trained_with_yarn(make_llama, tmp_path, 4.0, context_length=64)
        made = rope_dist.plan(model, factor=2, strategy="dprope")
        assert made.original_length == 256
        plan = rope_dist.RopePlan.from_dict({**made.to_dict(), "original_length": planned})
        assert export.verify(export.gguf(source, plan, tmp_path / "out.gguf"), plan)
        other = rope_dist.RopePlan.from_dict({**made.to_dict(), "original_length": 128})
        with pytest.raises(ValueError, match="trained length of 128"):
            export.gguf(source, other, tmp_path / "other.gguf")

    def test_another_alignment_and_fields_that_are_not_text(self, model, plan, tmp_path):
        kinds = gguf.GGUFValueType
        source = write_gguf(
            model,
            tmp_path / "model.gguf",
            alignment=128,
            x__bytes=([b"\xff\xfe", b"\xc3"], kinds.ARRAY, kinds.STRING),
            x__text=("\u00e4" * 5, kinds.STRING),
        )
        out = export.gguf(source, plan, tmp_path / "out.gguf")
        before, after = gguf.GGUFReader(source), gguf.GGUFReader(out)
        for key in ("x.bytes", "x.text"):
            old, new = (b"".join(p.tobytes() for p in r.fields[key].parts) for r in (before, after))
            assert new == old
        assert after.alignment == 128
        assert all(t.data_offset % 128 == 0 for t in after.tensors)
        assert {**tensors(out), FACTORS: None} == {**tensors(source), FACTORS: None}

    def test_memory_stays_flat(self, make_llama, plan, tmp_path):
        model = make_llama(vocab_size=2000, hidden_size=2048, intermediate_size=8192, head_dim=16)
        source = write_gguf(model, tmp_path / "big.gguf")
        del model
        size = source.stat().st_size
        assert size > 400e6
        tracemalloc.start()
        export.gguf(source, plan, tmp_path / "out.gguf")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50e6


class TestLlamaCpp:
    @pytest.fixture(autouse=True)
    def needs(self):
        pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")

    @staticmethod
    def compare(model, path, ids, count, forbidden=()):
        """Greedy tokens past the trained length, and the largest difference of their log-probabilities."""
        tokens, values = LlamaCpp(path, 192).greedy(ids, count, forbidden)
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1].double()
        got = logits.log_softmax(-1)[torch.arange(count), torch.tensor(tokens)]
        logits[:, list(forbidden)] = -torch.inf
        return logits.argmax(-1).tolist() == tokens, (got - torch.tensor(values)).abs().max().item()

    @pytest.mark.parametrize("strategy", ["dprope", "yarn"])
    def test_runs_the_plan(self, model, source, tmp_path, strategy):
        plan = rope_dist.plan(model, factor=2, strategy=strategy)
        out = export.gguf(source, plan, tmp_path / "out.gguf")
        ids = torch.randint(3, 128, (62,), generator=torch.Generator().manual_seed(2)).tolist()
        with rope_dist.enable(model, plan=plan):
            same, difference = self.compare(model, out, ids, 64, forbidden=(0, 1, 2))
            assert same
            assert difference < 1e-3
            # Both see the frequencies: the unpatched file, its length raised, is another model.
            plain = write_gguf(model, tmp_path / "plain.gguf", context_length=128)
            same, difference = self.compare(model, plain, ids, 64, forbidden=(0, 1, 2))
            assert not same
            assert difference > 0.1

    def test_a_model_trained_with_yarn(self, make_llama, tmp_path):
        """llama.cpp runs the source as transformers runs the model, and the export as the extended model."""
        model, source = trained_with_yarn(make_llama, tmp_path, 2.0)
        ids = torch.randint(3, 128, (120,), generator=torch.Generator().manual_seed(2)).tolist()
        special = (0, 1, 2)
        same, difference = self.compare(model, source, ids[:60], 64, special)
        assert same
        assert difference < 1e-3
        plan = rope_dist.plan(model, factor=2, strategy="dprope")
        out = export.gguf(source, plan, tmp_path / "out.gguf")
        with rope_dist.enable(model, plan=plan):
            same, difference = self.compare(model, out, ids, 64, special)
            assert same
            assert difference < 1e-3
            # Both see the frequencies.
            assert self.compare(model, source, ids[:60], 64, special)[1] > 0.1

    def test_forced_tokens_have_the_models_probabilities(self, model, source, plan, tmp_path):
        """The way in which a text is read for its perplexity."""
        engine = LlamaCpp(export.gguf(source, plan, tmp_path / "out.gguf"), 192)
        ids = torch.randint(3, 128, (110,), generator=torch.Generator().manual_seed(3)).tolist()
        values = [engine.log_probability(ids[:i], ids[i]) for i in range(70, 110)]
        with rope_dist.enable(model, plan=plan), torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected = torch.stack([expected[i - 1, ids[i]] for i in range(70, 110)])
        torch.testing.assert_close(torch.tensor(values).double(), expected, rtol=0, atol=1e-3)


class TestBadInput:
    @pytest.fixture
    def fails(self, source, plan, tmp_path, capsys):
        plan.save(tmp_path / "plan.json")

        def run(*extra, of=source, plan="plan.json", out="out.gguf"):
            before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
            arguments = ("export", "gguf", of, "--plan", tmp_path / plan, "-o", tmp_path / out, *extra)
            assert main([str(a) for a in arguments]) == 2
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert error.startswith("rope-dist: error: ")
            assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
            return error

        return run

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.05, 0.5, 0.999])
    def test_a_file_cut_short(self, fails, source, tmp_path, share):
        data = source.read_bytes()
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(data[: int(len(data) * share)])
        assert "GGUF file" in fails(of=cut)

    def test_a_damaged_header_is_a_value_error(self, source, plan, tmp_path):
        """Bytes of the header changed at random: refused with a reason, or copied; never another error."""
        data, damaged, out = source.read_bytes(), tmp_path / "damaged.gguf", tmp_path / "out.gguf"
        random, refusals = Random(0), 0
        for _ in range(400):
            new = bytearray(data)
            for _ in range(random.choice((1, 4))):
                new[random.randrange(min(4000, len(data)))] = random.choice(
                    (0, 1, 255, random.randrange(256))
                )
            damaged.write_bytes(new)
            try:
                export.gguf(damaged, plan, out, force=True)
            except ValueError:
                refusals += 1
        assert 0 < refusals < 400
        assert {p.name for p in tmp_path.iterdir()} <= {"model.gguf", "damaged.gguf", "out.gguf"}

    def test_an_architecture_without_a_slot(self, fails, model, tmp_path):
        other = write_gguf(model, tmp_path / "other.gguf", arch="qwen2")
        assert "no slot for factors in the architecture 'qwen2'" in fails(of=other)

    def test_factors_in_an_architecture_without_a_slot(self, source, model, plan, tmp_path):
        """llama.cpp would not use them: verify says so although the tensor is there."""
        done = export.gguf(source, plan, tmp_path / "done.gguf").read_bytes()
        assert export.verify(tmp_path / "done.gguf", plan)
        other = tmp_path / "other.gguf"
        other.write_bytes(done.replace(b"llama", b"qwen2"))
        (check,) = export.verify(other, plan).checks
        assert "the graph of the architecture 'qwen2' does not use" in check.reason

    def test_a_plan_for_another_model(self, fails, model, plan, source, tmp_path):
        for name, numbers in (
            ("theta", {"theta": 5e5, "head_dim": 16, "original_length": 64}),
            ("head_dim", {"theta": 1e4, "head_dim": 32, "original_length": 64}),
            ("trained length", {"theta": 1e4, "head_dim": 16, "original_length": 32}),
        ):
            rope_dist.plan(**numbers, factor=2).save(tmp_path / "other.json")
            assert name in fails(plan="other.json")
        export.gguf(source, plan, tmp_path / "done.gguf")
        rope_dist.plan(model, factor=2, strategy="ntk").save(tmp_path / "ntk.json")
        assert "has 128" in fails(of=tmp_path / "done.gguf", plan="ntk.json")

    def test_one_part_of_several(self, fails, model, tmp_path):
        part = write_gguf(model, tmp_path / "part.gguf", split__count=(2, gguf.GGUFValueType.UINT16))
        assert "join them" in fails(of=part)

    def test_scaling_at_run_time(self, fails, source, model, tmp_path):
        """llama.cpp takes the long or the short factors of a longrope by the size of its context."""
        dynamic = rope_dist.dynamic_plan(model, factor=2, strategy="pi")
        out = export.gguf(source, dynamic, tmp_path / "longrope.gguf")
        assert "which llama.cpp chooses by the context" in fails(of=out)

    def test_settings_that_llama_cpp_does_not_read_of_a_file(self, model, tmp_path):
        """yarn_ext_factor and the betas are arguments, but for few architectures."""
        kinds = gguf.GGUFValueType
        fields = {
            "llama__rope__scaling__type": ("yarn", kinds.STRING),
            "llama__rope__scaling__factor": (4.0, kinds.FLOAT32),
        }
        plain = read(write_gguf(model, tmp_path / "yarn.gguf", **fields)).engine_config()
        for key, value in (("ext_factor", 0.5), ("beta_fast", 8.0), ("attn_factor", 2.0)):
            own = {f"llama__rope__scaling__yarn_{key}": (value, kinds.FLOAT32)}
            found = read(write_gguf(model, tmp_path / f"{key}.gguf", **fields, **own)).engine_config()
            assert torch.equal(found.inv_freq, plain.inv_freq)
            assert found.attention_scaling == plain.attention_scaling
        # This one is read, by every architecture.
        own = {"llama__rope__scaling__attn_factor": (2.0, kinds.FLOAT32)}
        found = read(write_gguf(model, tmp_path / "scaled.gguf", **fields, **own)).engine_config()
        assert found.attention_scaling == pytest.approx(2 * plain.attention_scaling)

    def test_targets(self, fails, tmp_path, source):
        (tmp_path / "there.gguf").write_text("mine")
        assert "--force" in fails(out="there.gguf")
        assert "source itself" in fails("--force", out="model.gguf")
        (tmp_path / "folder").mkdir()
        assert "not a regular file" in fails("--force", out="folder")
        assert "not a directory" in fails(out="no/such.gguf")
        (tmp_path / "loop").symlink_to("loop")
        assert "not a file" in fails(of=tmp_path / "loop")
        if os.path.isdir("/proc"):
            # Not even root makes one there; the name is the user's, not that of the temporary.
            assert "/proc/out.gguf: No such file" in fails(out="/proc/out.gguf")

    @pytest.mark.parametrize(
        "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
    )
    def test_an_interruption_leaves_nothing(self, source, plan, tmp_path, monkeypatch, failure):
        before = source.read_bytes()

        def fail(*arguments):
            raise failure

        monkeypatch.setattr("rope_dist.export.gguf_file.copy_bytes", fail)
        with pytest.raises(type(failure)):
            export.gguf(source, plan, tmp_path / "out.gguf")
        assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
        assert source.read_bytes() == before

    def test_verify_refuses_what_the_stock_converter_wrote(self, source, plan, model, tmp_path, capsys):
        plan.save(tmp_path / "plan.json")
        converted = write_gguf(model, tmp_path / "converted.gguf", context_length=128)
        assert main(["verify", str(converted), "--plan", str(tmp_path / "plan.json")]) == 2
        assert "the factors are missing" in capsys.readouterr().err
        yarn = rope_dist.plan(model, factor=2, strategy="yarn", beta_fast=8)
        out = export.gguf(source, yarn, tmp_path / "out.gguf")
        kinds = gguf.GGUFValueType
        for key, value, kind, reason in (
            ("llama.rope.scaling.attn_factor", 1.0, kinds.FLOAT32, "scaled by 1, planned 1.06931"),
            ("llama.context_length", 64, kinds.UINT32, "reads 64 tokens, planned 128"),
        ):
            changed = tmp_path / "changed.gguf"
            changed.write_bytes(out.read_bytes())
            field = gguf.GGUFReader(changed, "r+").fields[key]
            assert field.types == [kind]
            field.parts[field.data[0]][0] = value
            del field
            (check,) = export.verify(changed, yarn).checks
            assert reason in check.reason

"""Models that know nothing of regfast, small and random: trained for ten steps by PyTorch alone and on regfast, the
losses are the same to 1e-5, and the kernels that ran are ours."""

import contextlib
import copy
import sys

import pytest
import torch
from torch import nn

import regfast
from regfast._paths import recorded

transformers = pytest.importorskip("transformers")
STEPS, V = 10, 96
TABLES = sys.modules["regfast.accelerate"]


def ids(batch=2, length=12, most=V):
    return torch.randint(most, (batch, length))


def causal(config):
    tokens = ids()
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.2, -100)
    return transformers.AutoModelForCausalLM.from_config(config), {"input_ids": tokens, "labels": labels}


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": V}
GQA = {**SIZES, "num_key_value_heads": 1, "head_dim": 16}


def gpt2():
    return causal(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=V))


def llama():
    return causal(transformers.LlamaConfig(**GQA, tie_word_embeddings=False))


def gemma2():
    return causal(transformers.Gemma2Config(**GQA, final_logit_softcapping=5.0, attn_logit_softcapping=10.0))


def cohere():
    return causal(transformers.CohereConfig(**{k: v for k, v in GQA.items() if k != "head_dim"}, logit_scale=0.25))


def bert():
    model = transformers.BertForTokenClassification(transformers.BertConfig(**SIZES, num_labels=5))
    return model, {"input_ids": ids(), "labels": ids(most=5)}


def bert_masked():
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    return model, {"input_ids": ids(), "labels": ids()}


def t5():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": V}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    return model, {"input_ids": ids(), "labels": ids()}


def vit():
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=7)
    return transformers.ViTForImageClassification(config), {
        "pixel_values": torch.randn(4, 3, 16, 16),
        "labels": ids(4, 1, 7)[:, 0],
    }


def timm_vit():
    timm = pytest.importorskip("timm")  # which torchvision has to fit

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
            self.body = timm.models.VisionTransformer(**sizes)

        def forward(self, pixels, labels):
            logits = self.body(pixels)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    return Classifier(), {"pixels": torch.randn(4, 3, 16, 16), "labels": ids(4, 1, 7)[:, 0]}


class LanguageModel(nn.Module):
    """As PyTorch's tutorials build one of nn.TransformerEncoder."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, 32)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, activation="gelu"), 2
        )
        self.decoder = nn.Linear(32, V)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, input_ids, labels):
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        logits = self.decoder(self.encoder(self.embedding(input_ids), mask=mask, is_causal=True))
        return {"loss": self.loss(logits.view(-1, V), labels.view(-1)), "logits": logits}


def transformer_encoder():
    return LanguageModel(), {"input_ids": ids(), "labels": ids()}


def perceptron():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.GELU(), nn.Linear(64, 32), nn.Tanh())
            self.head = nn.Linear(32, 7)

        def forward(self, pixels, labels):
            logits = self.head(self.layers(pixels))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    return Model(), {"pixels": torch.randn(8, 3, 8, 8), "labels": ids(8, 1, 7)[:, 0]}


MODELS = {
    f.__name__: f
    for f in (gpt2, llama, gemma2, cohere, bert, bert_masked, t5, vit, timm_vit, transformer_encoder, perceptron)
}
HEADS = {"transformer_encoder": "decoder", "perceptron": "head"}
WITHOUT_HEAD = {"bert", "vit", "timm_vit"}  # no get_output_embeddings: few classes


def made(name):
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    for module in model.modules():  # noise would differ with the number of numbers drawn
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train(), batch


def train(model, batch, forward=None, steps=STEPS):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = (model if forward is None else forward)(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return losses


@pytest.fixture
def all_sizes(monkeypatch):
    """The tables of accelerate() would leave models this small to torch."""
    for table in (TABLES.SOFTMAX, TABLES.CROSS_ENTROPY, TABLES.MSE_LOSS):
        for dtype in list(table):
            monkeypatch.setitem(table, dtype, 1)
    monkeypatch.setitem(TABLES.LINEAR, torch.float32, (1, 1 << 62))


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def same_losses(ours, stock):
    assert ours == pytest.approx(stock, rel=1e-5, abs=1e-5)


def stock_losses(name):
    model, batch = made(name)
    return train(model, batch)


def ops(calls):
    return {c.op.removesuffix("_backward").removesuffix("_forward") for c in calls}


@pytest.mark.parametrize("way", ["accelerate", "replace", "everything"])
def test_trains_alike(name, way, all_sizes):
    stock = stock_losses(name)
    model, batch = made(name)
    state = set(model.state_dict())
    with contextlib.ExitStack() as stack:
        if way != "replace":
            stack.enter_context(regfast.accelerate())
        report = None
        if way != "accelerate":
            report = regfast.replace(model, head=HEADS.get(name, "auto"))
        calls = stack.enter_context(recorded())
        losses = train(model, batch)
    same_losses(losses, stock)
    assert not any(call.path == "composite" for call in calls)
    lazy = way != "accelerate" and name not in WITHOUT_HEAD
    if lazy:
        assert "linear_cross_entropy" in ops(calls) and "cross_entropy" not in ops(calls)
        # Of the last layer, no product has V outputs.
        assert not any(f", {V}]" in c.tensors.split("float32")[-1] and c.op == "linear_forward" for c in calls)
    elif way == "accelerate":
        assert "cross_entropy" in ops(calls)
    assert "linear" in ops(calls) or (name == "gpt2" and way == "accelerate")  # whose layers are torch.addmm
    assert set(model.state_dict()) == state
    if report is not None:
        report.restore()
        assert not any(type(m).__module__.startswith("regfast") for m in model.modules())


def test_evaluation_and_generation():
    model, batch = made("llama")
    model.eval()
    with torch.no_grad():
        true = model(**batch)
        tokens = model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False)
        regfast.replace(model)
        assert type(model(**batch).logits) is torch.Tensor
        torch.testing.assert_close(model(**batch).logits, true.logits)
        assert torch.equal(model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False), tokens)
    model.train()
    output = model(**batch)
    assert type(output.logits) is regfast.LazyLogits
    torch.testing.assert_close(output.logits.softmax(-1), true.logits.softmax(-1))  # whoever looks may


@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_half_types(name, dtype, all_sizes):
    """Nearer to float32 than PyTorch's own, or as near."""
    exact = stock_losses(name)

    def run(model, batch):
        if dtype == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return train(model, batch)
        return train(model.to(dtype), batch)

    stock = run(*made(name))
    model, batch = made(name)
    regfast.replace(model)
    with regfast.accelerate(), recorded() as calls:
        ours = run(model, batch)
    assert "linear_cross_entropy" in ops(calls)
    assert ours == pytest.approx(exact, rel=2 * max(abs(s / e - 1) for s, e in zip(stock, exact, strict=True)) + 1e-2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiled(name, all_sizes):
    torch._dynamo.reset()
    stock = stock_losses(name)[:3]
    model, batch = made(name)
    model.loss_type = "ForCausalLM"  # or GPT-2 logs, which Dynamo does not trace
    regfast.replace(model)
    with regfast.accelerate(), recorded() as calls:
        losses = train(model, batch, torch.compile(model, fullgraph=True, backend="aot_eager"), steps=3)
    same_losses(losses, stock)
    assert {"linear", "cross_entropy"} <= ops(calls)
    torch._dynamo.reset()


def test_trainer_with_gradient_accumulation(tmp_path, all_sizes):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in ids(16)]

    def run(name, prepare):
        model, _ = made("llama")
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path / name,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        with prepare(model), recorded() as calls:
            trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
            trainer.train()
        history = trainer.state.log_history
        return [h["loss"] for h in history if "loss" in h] + [
            h["eval_loss"] for h in history if "eval_loss" in h
        ], calls

    @contextlib.contextmanager
    def ours(model):
        regfast.replace(model)
        with regfast.accelerate():
            yield

    stock, none = run("stock", lambda model: contextlib.nullcontext())
    losses, calls = run("ours", ours)
    assert not none and "linear_cross_entropy" in ops(calls)
    assert losses == pytest.approx(stock, rel=1e-4, abs=1e-4)  # the Trainer rounds what it logs


def test_accelerator_of_the_accelerate_library(all_sizes):
    accelerate = pytest.importorskip("accelerate")

    def run(prepare):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # one a process, says the library
        model, batch = made("llama")
        prepare(model)
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=2)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
        losses = []
        for _ in range(4):
            with accelerator.accumulate(model):
                output = model(**batch)
                accelerator.backward(output.loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(output.loss.item())
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        return losses, output.logits

    stock, _ = run(lambda model: None)
    with recorded() as calls:
        ours, logits = run(regfast.replace)
    assert ours == pytest.approx(stock, rel=1e-2)
    assert "linear_cross_entropy" in ops(calls)
    assert logits.dtype is torch.float32  # as the library casts what a model returns


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_module(precision, tmp_path, all_sizes):
    lightning = pytest.importorskip("lightning")
    rows = [{"input_ids": row, "labels": row} for row in ids(16)]

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch, index):
            loss = self.model(**batch)["loss"]
            self.losses.append(loss.item())
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, index):
            output = self.model(**batch)
            self.losses.append(output["loss"].item())
            self.log("accuracy", (output["logits"].argmax(-1) == batch["labels"]).float().mean())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    def run(prepare):
        torch.manual_seed(1)
        module = Module(made("llama")[0])
        trainer = lightning.Trainer(
            accelerator="cpu",
            precision=precision,
            max_steps=4,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            check_val_every_n_epoch=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        with prepare(module):
            loaders = [torch.utils.data.DataLoader(rows, batch_size=2) for _ in range(2)]
            trainer.fit(module, *loaders)
        return module.losses

    @contextlib.contextmanager
    def ours(module):
        regfast.replace(module)
        with regfast.accelerate():
            yield

    stock = run(lambda module: contextlib.nullcontext())
    with recorded() as calls:
        losses = run(ours)
    assert "linear_cross_entropy" in ops(calls) and len(losses) == len(stock) > 16
    assert losses == pytest.approx(stock, rel=1e-5 if precision == "32-true" else 1e-2)


def test_checkpointing_of_activations():
    stock = stock_losses("llama")
    model, batch = made("llama")
    model.gradient_checkpointing_enable()
    regfast.replace(model)
    same_losses(train(model, batch), stock)


def test_lora_of_a_replaced_model():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"], lora_dropout=0.0)

    def adapted(model):
        torch.manual_seed(1)
        return peft.get_peft_model(model, copy.deepcopy(config))

    model, batch = made("llama")
    stock = train(adapted(model), batch)
    model, batch = made("llama")
    regfast.replace(model)
    before = adapted(model)
    same_losses(train(before, batch), stock)
    model, batch = made("llama")
    after = adapted(model)
    report = regfast.replace(after)
    same_losses(train(after, batch), stock)
    assert any(e.was is nn.Linear for e in report.changed)
    merged = after.merge_and_unload()
    torch.testing.assert_close(merged(**batch).loss, before(**batch).loss, rtol=1e-4, atol=1e-4)

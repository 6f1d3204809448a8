"""What transformers does with a model: caches, padding, generate() in all its ways, pipelines and its Trainer."""

import pytest
import torch
from kernel_helpers import trace
from model_helpers import SMALL, batch, golden_model, gradients, greedy, left_padded, method_settings, small_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

from cocomix.data.tokenizer import train_tokenizer
from cocomix.model.positions import CACHE_NAME

EVERY_KIND = [
    ("interleave", 0),
    ("interleave", 1),
    ("interleave", 2),
    ("interleave residual", 1),
    ("add", 0),
    ("add", 2),
    ("predict", 1),
    ("pause", 0),
    ("pause", 2),
    ("pause residual", 1),
    ("interleave every-2", 0),
    ("interleave residual every-3", 1),
    ("interleave every-2", 2),
    ("pause every-4", 1),
    ("none", 0),
]
every_kind = pytest.mark.parametrize("mixing, insert_layer", EVERY_KIND)
# With fewer concepts than tokens, padding on the left would move them.
every_kind_that_pads = pytest.mark.parametrize(
    "mixing, insert_layer", [kind for kind in EVERY_KIND if "every" not in kind[0]]
)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_are_those_of_the_papers_implementation(use_cache):
    model, expected = golden_model()
    model.generation_config.eos_token_id = None
    prompt = expected["greedy"][:, :8]
    n_new = expected["greedy"].shape[1] - 8
    assert torch.equal(greedy(model, prompt, n_new, use_cache=use_cache), expected["greedy"])


@every_kind
@pytest.mark.parametrize("parts", [[1] * 9, [5, 1, 1, 2], [3, 6]])
def test_logits_with_a_cache_are_those_of_the_whole_sequence(mixing, insert_layer, parts):
    model = small_model(**method_settings(mixing), insert_layer=insert_layer)
    ids, _ = batch(model.config, length=9)
    whole, cache, pieces = model(ids).logits, None, []
    for part in ids.split(parts, dim=1):
        out = model(part, cache=cache, use_cache=True)
        cache = out.cache
        pieces.append(out.logits)
    assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@every_kind
def test_generate_gives_the_same_tokens_with_and_without_a_cache(mixing, insert_layer):
    model = small_model(**method_settings(mixing), insert_layer=insert_layer)
    ids, _ = batch(model.config, length=4)
    tokens = greedy(model, ids, 8, use_cache=True)
    assert tokens.shape == (2, 12)
    assert torch.equal(tokens, greedy(model, ids, 8, use_cache=False))
    expected = ids
    for _ in range(8):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, expected)


@every_kind
def test_generate_feeds_the_cache_one_token_at_a_time(mixing, insert_layer):
    model = small_model(**method_settings(mixing), insert_layer=insert_layer)
    lengths = []
    model.transformer.wte.register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[1]))
    greedy(model, batch(model.config, length=5)[0], 4)
    assert lengths == [5, 1, 1, 1]


@pytest.mark.parametrize("mixing, insert_layer", [("interleave", 0), ("interleave", 1), ("none", 0)])
def test_beams_are_the_same_with_and_without_a_cache(mixing, insert_layer):
    model = small_model(**method_settings(mixing), insert_layer=insert_layer)
    ids, _ = batch(model.config, length=4)
    assert torch.equal(*(greedy(model, ids, 5, num_beams=3, use_cache=use_cache) for use_cache in (True, False)))


@every_kind_that_pads
@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padded_prompts_go_on_as_they_would_alone(mixing, insert_layer, use_cache):
    model = small_model(**method_settings(mixing), insert_layer=insert_layer)
    full, _ = batch(model.config, n_rows=3, length=5)
    prompts = [full[0, :2], full[1], full[2, :4]]
    ids, mask = left_padded(prompts, 5)
    together = greedy(model, ids, 6, attention_mask=mask, use_cache=use_cache)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row, 5:], greedy(model, prompt[None], 6)[0, len(prompt) :]), row


@every_kind_that_pads
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits_of_the_tokens(mixing, insert_layer, side):
    model = small_model(**method_settings(mixing), insert_layer=insert_layer)
    ids, _ = batch(model.config, n_rows=1, length=5)
    padding = torch.tensor([[7, 9]])
    ones, zeros = torch.ones_like(ids), torch.zeros_like(padding)
    padded, mask = (torch.cat(pair if side == "right" else pair[::-1], 1) for pair in ((ids, padding), (ones, zeros)))
    out = model(padded, attention_mask=mask)
    kept = out.logits[:, :5] if side == "right" else out.logits[:, 2:]
    assert_close(kept, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(out.logits).all()


def test_padding_gives_finite_gradients():
    model = small_model()
    ids, _ = batch(model.config)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


@every_kind
def test_a_sequence_beyond_the_context_is_refused_with_the_numbers(mixing, insert_layer):
    model = small_model(**method_settings(mixing), insert_layer=insert_layer)
    limit = SMALL["n_positions"]
    ids = torch.zeros(1, limit + 1, dtype=torch.long)
    message = rf"{limit + 1} tokens .* n_positions={limit}"
    with pytest.raises(ValueError, match=message):
        model(ids)
    cache = model(ids[:, :limit], use_cache=True).cache
    with pytest.raises(ValueError, match=message):
        model(ids[:, :1], cache=cache, use_cache=True)
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=message):
            greedy(model, ids[:, : limit - 2], 5, use_cache=use_cache)


def test_the_cache_has_two_names_in_arguments_and_outputs():
    model = small_model()
    ids, _ = batch(model.config, length=6)
    whole = model(ids).logits
    for names in (("cache", "cache"), ("past_key_values", "past_key_values"), ("cache", "past_key_values")):
        for net in (model, model.transformer):
            given, returned = names
            first = net(ids[:, :4], use_cache=True)
            assert first.cache is first.past_key_values and isinstance(first.cache, DynamicCache)
            then = net(ids[:, 4:], use_cache=True, **{given: getattr(first, returned)})
            assert getattr(then, returned).get_seq_length() == 6
            if net is model:
                assert_close(then.logits, whole[:, 4:], rtol=1e-4, atol=1e-4)
    cache = model(ids, use_cache=True).cache
    for net in (model, model.transformer):
        with pytest.raises(ValueError, match="cache and past_key_values are two names of the same argument"):
            net(ids[:, :1], cache=cache, past_key_values=cache)
    assert first.get("concept_loss") is None
    with pytest.raises(AttributeError, match="no attribute 'cash'"):
        _ = first.cash


def test_training_returns_no_cache_and_inference_does():
    model = small_model()
    ids, _ = batch(model.config)
    assert model(ids, labels=ids).cache is None
    assert model(ids, use_cache=False).cache is None
    assert model(ids).cache is not None


# --- everything together: batches of unlike prompts, cached, searched and sampled


@pytest.mark.parametrize("every", [2, 3])
def test_padding_that_would_move_concept_positions_is_refused(every):
    model = small_model(**method_settings(f"interleave residual every-{every}"), insert_layer=1)
    ids, _ = batch(model.config, n_rows=1, length=5)
    alone = model(ids).logits[0]
    for padding in range(1, 7):
        padded, mask = left_padded([ids[0]], 5 + padding)
        if padding % every:
            with pytest.raises(
                ValueError, match=f"must be a multiple of concept_every={every} tokens.*\\[{padding}\\]"
            ):
                model(padded, attention_mask=mask)
            continue
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[0, padding:], alone, rtol=0, atol=1e-5)
    on_the_right = torch.cat([ids, ids[:, :3]], 1)
    mask = torch.tensor([[1] * 5 + [0] * 3])
    torch.testing.assert_close(model(on_the_right, attention_mask=mask).logits[0, :5], alone, rtol=0, atol=1e-5)


@every_kind_that_pads
def test_every_row_of_a_padded_batch_has_the_logits_that_it_has_alone_at_every_cached_step(mixing, insert_layer):
    model = small_model(**method_settings(mixing), insert_layer=insert_layer)
    full, _ = batch(model.config, n_rows=3, length=11)
    lengths, cut = (2, 5, 4), 5
    prompts = [full[row, :length] for row, length in enumerate(lengths)]
    ids, mask = left_padded(prompts, cut)
    alone = [model(full[row : row + 1, : length + 6]).logits[0] for row, length in enumerate(lengths)]
    cache = None
    for step in range(7):
        new = ids if step == 0 else torch.stack([full[row, n + step - 1] for row, n in enumerate(lengths)])[:, None]
        mask = mask if step == 0 else torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        out = model(new, attention_mask=mask, cache=cache, use_cache=True)
        cache = out.cache
        for row, length in enumerate(lengths):
            assert_close(out.logits[row, -1], alone[row][length + step - 1], rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == cut + step


@pytest.mark.parametrize("mixing, insert_layer", [("interleave", 0), ("interleave", 2), ("add", 1)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_of_padded_prompts_are_those_of_each_prompt_alone(mixing, insert_layer, use_cache):
    model = small_model(**method_settings(mixing), insert_layer=insert_layer)
    full, _ = batch(model.config, n_rows=2, length=5)
    prompts = [full[0, :3], full[1]]
    ids, mask = left_padded(prompts, 5)
    together = greedy(model, ids, 6, attention_mask=mask, use_cache=use_cache, num_beams=3, num_return_sequences=2)
    for row, prompt in enumerate(prompts):
        alone = greedy(model, prompt[None], 6, num_beams=3, num_return_sequences=2)
        assert torch.equal(together[2 * row : 2 * row + 2, 5:], alone[:, len(prompt) :])


def test_samples_are_the_same_with_and_without_a_cache_and_follow_the_models_probabilities():
    model = small_model()
    ids, _ = batch(model.config, n_rows=1, length=4)

    def sample(**options):
        torch.manual_seed(5)
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=0, **options
        )

    assert torch.equal(
        *(
            sample(max_new_tokens=7, use_cache=use_cache, temperature=2.0, num_return_sequences=3)
            for use_cache in (True, False)
        )
    )
    drawn = sample(max_new_tokens=1, num_return_sequences=4000)[:, -1].bincount(minlength=SMALL["vocab_size"]) / 4000
    assert_close(drawn, model(ids).logits[0, -1].softmax(-1), rtol=0, atol=0.03)


@pytest.mark.parametrize("mixing, insert_layer", [("interleave", 0), ("interleave", 1), ("add", 1)])
def test_tokens_that_a_draft_got_wrong_leave_the_cache(mixing, insert_layer):
    model = small_model(**method_settings(mixing), insert_layer=insert_layer, n_positions=40)
    ids = torch.tensor([[3, 4, 5, 3, 4, 6, 3, 4]])
    assert torch.equal(greedy(model, ids, 16, prompt_lookup_num_tokens=3), greedy(model, ids, 16))
    cache = model(ids, use_cache=True).cache
    cache.crop(-3)
    assert cache.get_seq_length() == 5
    logits = model(ids[:, 5:], cache=cache, use_cache=True).logits
    assert_close(logits, model(ids).logits[:, 5:], rtol=1e-4, atol=1e-4)


def test_a_cache_of_the_users_is_filled_and_one_of_fixed_size_refused():
    model = small_model()
    ids, _ = batch(model.config, length=4)
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        assert torch.equal(greedy(model, ids, 5, **{CACHE_NAME: cache}), greedy(model, ids, 5))
        assert cache.get_seq_length() == 8
    with pytest.raises(ValueError, match="a cache with a StaticLayer is not supported: take a DynamicCache"):
        greedy(model, ids, 5, cache_implementation="static")


@pytest.mark.parametrize("mixing, insert_layer", [("interleave", 0), ("interleave", 2), ("add", 1)])
def test_a_new_token_costs_the_same_whatever_went_before_but_for_attention(mixing, insert_layer):
    model = small_model(**method_settings(mixing), insert_layer=insert_layer, n_positions=64)
    ids, _ = batch(model.config, n_rows=1, length=50)

    def products(n_past):
        with torch.no_grad():
            cache = model(ids[:, :n_past], use_cache=True).cache
            return sum(trace(lambda: model(ids[:, :1], cache=cache, use_cache=True).logits)[0].values())

    with torch.no_grad():
        alone = sum(trace(lambda: model(ids[:, :1], use_cache=False).logits)[0].values())
    assert products(1) == products(7) == products(50) == alone > 0  # attention is not a product of the profile's


# --- pipelines and the Trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model and its tokenizer, as training leaves it."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog and runs. " * 20], 300)
    tokenizer.save_pretrained(folder)
    model = small_model(vocab_size=300, n_positions=32)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    return folder


def test_the_text_generation_pipeline_continues_batches_as_generate_does(saved):
    tokenizer = AutoTokenizer.from_pretrained(saved, padding_side="left", pad_token="<|endoftext|>")
    generator = pipeline("text-generation", model=str(saved), tokenizer=tokenizer, device="cpu")
    prompts = ["the quick", "the lazy dog and runs over the fox"]
    model = AutoModelForCausalLM.from_pretrained(saved)
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected.append(tokenizer.decode(greedy(model, ids, 8)[0], skip_special_tokens=True))
    results = generator(prompts, max_new_tokens=8, do_sample=False, batch_size=2)
    assert [result[0]["generated_text"] for result in results] == expected
    assert all(text.startswith(prompt) and text != prompt for text, prompt in zip(expected, prompts, strict=True))


def test_micro_batches_of_the_trainer_add_up_to_one_batch_by_predicted_tokens():
    model = small_model(torch.float64)
    ids, concept_labels = batch(model.config, n_rows=6)
    labels = ids.clone()
    labels[1, 3:] = labels[4:, 1:] = -100  # unlike shares; nothing is predicted in the last micro batch
    whole = model(ids, labels=labels)
    whole.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    n_predicted, total = (labels[:, 1:] != -100).sum(), 0.0
    for rows in (slice(0, 3), slice(3, 4), slice(4, 6)):
        loss = model(ids[rows], labels=labels[rows], num_items_in_batch=n_predicted).loss
        loss.backward()
        total += loss.detach()
    assert_close(total, whole.loss.detach())
    assert_close(gradients(model), expected)
    half = model(ids, labels=ids, concept_labels=concept_labels, num_items_in_batch=2 * 36)
    plain = model(ids, labels=ids, concept_labels=concept_labels)
    assert_close(half.loss, plain.loss / 2)
    assert_close(half.concept_loss, plain.concept_loss / 2)


def test_transformers_own_trainer_takes_the_steps_of_plain_pytorch(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    ids, concept_labels = batch(small_model().config, n_rows=8, length=10)
    concept_labels[:, :-1].clamp_(min=0)  # as many labelled tokens in each micro batch
    rows = [
        {"input_ids": row, "labels": row, "concept_labels": concepts}
        for row, concepts in zip(ids, concept_labels, strict=True)
    ]
    model, expected = small_model().train(), small_model().train()
    expected.load_state_dict(model.state_dict())
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=3,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            optim="sgd",
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        out = expected(ids, labels=ids, concept_labels=concept_labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert logged == pytest.approx(losses, rel=1e-3)  # it rounds
    for name, parameter in expected.named_parameters():
        assert_close(dict(model.named_parameters())[name], parameter, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        loss = expected(ids, labels=ids, concept_labels=concept_labels).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-4)

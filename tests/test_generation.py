import pytest
import torch
from model_helpers import SMALL, batch, golden_model, small_model
from torch.testing import assert_close

EVERY_KIND = [("interleave", 0), ("interleave", 1), ("interleave", 2), ("add", 0), ("add", 2), ("none", 0)]
every_kind = pytest.mark.parametrize("mixing, insert_layer", EVERY_KIND)


def greedy(model, ids, n_new, **options):
    """Token ids of the prompts and of `n_new` greedy tokens."""
    options = {"attention_mask": torch.ones_like(ids), **options}  # else generate() takes tokens for padding
    return model.generate(ids, max_new_tokens=n_new, do_sample=False, pad_token_id=0, **options)


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
    model = small_model(mixing=mixing, insert_layer=insert_layer)
    ids, _ = batch(model.config, length=9)
    whole, cache, pieces = model(ids).logits, None, []
    for part in ids.split(parts, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@every_kind
def test_generate_gives_the_same_tokens_with_and_without_a_cache(mixing, insert_layer):
    model = small_model(mixing=mixing, insert_layer=insert_layer)
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
    model = small_model(mixing=mixing, insert_layer=insert_layer)
    lengths = []
    model.transformer.wte.register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[1]))
    greedy(model, batch(model.config, length=5)[0], 4)
    assert lengths == [5, 1, 1, 1]


@pytest.mark.parametrize("mixing, insert_layer", [("interleave", 0), ("interleave", 1), ("none", 0)])
def test_beams_are_the_same_with_and_without_a_cache(mixing, insert_layer):
    model = small_model(mixing=mixing, insert_layer=insert_layer)
    ids, _ = batch(model.config, length=4)
    assert torch.equal(*(greedy(model, ids, 5, num_beams=3, use_cache=use_cache) for use_cache in (True, False)))


def left_padded(prompts, length):
    """Prompts padded on the left with a token that is no zero, and their attention mask."""
    ids = torch.full((len(prompts), length), 7)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt):], mask[row, length - len(prompt):] = prompt, 1
    return ids, mask


@every_kind
@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padded_prompts_go_on_as_they_would_alone(mixing, insert_layer, use_cache):
    model = small_model(mixing=mixing, insert_layer=insert_layer)
    full, _ = batch(model.config, n_rows=3, length=5)
    prompts = [full[0, :2], full[1], full[2, :4]]
    ids, mask = left_padded(prompts, 5)
    together = greedy(model, ids, 6, attention_mask=mask, use_cache=use_cache)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row, 5:], greedy(model, prompt[None], 6)[0, len(prompt):]), row


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits_of_the_tokens(mixing, insert_layer, side):
    model = small_model(mixing=mixing, insert_layer=insert_layer)
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
    model = small_model(mixing=mixing, insert_layer=insert_layer)
    limit = SMALL["n_positions"]
    ids = torch.zeros(1, limit + 1, dtype=torch.long)
    message = rf"{limit + 1} tokens .* n_positions={limit}"
    with pytest.raises(ValueError, match=message):
        model(ids)
    cache = model(ids[:, :limit], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=message):
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=message):
            greedy(model, ids[:, :limit - 2], 5, use_cache=use_cache)


def test_training_returns_no_cache_and_inference_does():
    model = small_model()
    ids, _ = batch(model.config)
    assert model(ids, labels=ids).past_key_values is None
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids).past_key_values is not None

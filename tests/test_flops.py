import pytest

from cocomix.flops import StudentShape, TeacherShape, ideal_ratio

GPT2 = TeacherShape(n_embd=768, n_layer=12, layer=5, vocab_size=50257, n_latents=32768)


def paper(n_embd, n_layer, insert_layer):
    return StudentShape(n_embd, n_layer, insert_layer, vocab_size=50257, seq_len=1024, concept_dim=32768,
                        concept_topk=32)


@pytest.mark.parametrize("shape, cached, online", [
    (paper(512, 8, 3), 1.67, 3.17),
    (paper(1024, 24, 5), 1.84, 2.06),
    (paper(2048, 24, 5), 1.81, 1.87),
])
def test_ideal_ratios_of_the_papers_sizes(shape, cached, online):
    assert ideal_ratio(shape) == pytest.approx(cached, abs=0.005)
    assert ideal_ratio(shape, GPT2) == pytest.approx(online, abs=0.005)

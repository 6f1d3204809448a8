from cocomix.core.config import Config, DataConfig, ModelConfig
from cocomix.core.shapes import StudentShape, student_shape


def test_a_config_and_a_vocabulary_give_a_students_shape():
    model = ModelConfig(
        n_embd=64, n_layer=4, n_head=2, concept_dim=256, concept_topk=8, insert_layer=1, mixing="predict"
    )
    shape = student_shape(Config(data=DataConfig(seq_len=32), model=model), vocab_size=500)
    assert shape == StudentShape(64, 4, 1, 500, 32, 256, 8, "predict")

"""Image tokens inside a language model of transformers: a tiny random Llama."""

import pytest
import torch

from vistok import Tokenizer
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.quantizer import FSQ, GroupedQuantizer, VectorQuantizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CNN = {"base_channels": 32, "patch_size": 4, "num_blocks": 1}
TEXT = 50


def tokenizer_of(quantizer):
    torch.manual_seed(0)
    return Tokenizer(CNNEncoder(**CNN), quantizer, CNNDecoder(**CNN), preprocessing={"size": [8, 12]}).eval()


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=TEXT,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(params=[FSQ(levels=[5, 3]), GroupedQuantizer(FSQ(levels=[5, 3]), groups=2)], ids=["fsq", "grouped"])
def tokenizer(request):
    return tokenizer_of(request.param)


def extended(tokenizer, tied=False, **options):
    from vistok.tokens.huggingface import extend_vocabulary

    model = llama(tie_word_embeddings=tied)
    return model, extend_vocabulary(model, tokenizer, **options)


def test_the_vocabulary_grows_by_two_marks_and_all_codes(tokenizer):
    model, vocabulary = extended(tokenizer)
    assert vocabulary.size == TEXT + 2 + sum(tokenizer.quantizer.codebook_sizes)
    assert model.get_input_embeddings().weight.shape[0] == vocabulary.size
    assert model.get_output_embeddings().weight.shape[0] == vocabulary.size
    assert model.config.vocab_size == vocabulary.size


def test_rows_of_text_stay_as_they_are(tokenizer):
    before = llama().get_input_embeddings().weight
    model, _ = extended(tokenizer)
    assert torch.equal(model.get_input_embeddings().weight[:TEXT], before)


def test_tied_embeddings_stay_tied_and_start_from_the_codebook_on_both_sides():
    tokenizer = tokenizer_of(VectorQuantizer(codebook_size=16, dim=4))
    model, vocabulary = extended(tokenizer, tied=True, from_codebook=True)
    rows = model.get_input_embeddings().weight
    assert rows is model.get_output_embeddings().weight
    assert torch.pdist(rows[vocabulary.starts[0] :]).min() > 0


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_is_saved_and_loaded_again_knows_its_images(tokenizer, tmp_path, tied):
    from vistok.tokens.huggingface import interleave, vocabulary_of

    model, vocabulary = extended(tokenizer, tied=tied)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert vocabulary_of(loaded) == vocabulary
    tokens = tokenizer.flatten(tokenizer.encode(torch.zeros(1, 3, 8, 12)).indices)
    sequence = interleave([[1, 5], tokens], vocabulary)[None]
    with torch.inference_mode():
        assert torch.equal(model(sequence).logits, loaded(sequence).logits)


def test_a_model_without_images_says_so():
    from vistok.tokens.huggingface import vocabulary_of

    with pytest.raises(ValueError, match="call extend_vocabulary"):
        vocabulary_of(llama())


def test_rows_that_pad_the_vocabulary_are_never_drawn(tokenizer):
    from vistok.tokens.huggingface import ImageLogitsProcessor

    model, vocabulary = extended(tokenizer)
    model.resize_token_embeddings(pad_to_multiple_of=64)
    rows = model.get_output_embeddings().weight.shape[0]
    assert rows % 64 == 0
    assert rows > vocabulary.size
    in_text, in_image = torch.tensor([[1, 5]]), torch.tensor([[1, vocabulary.begin]])
    for ids in (in_text, in_image):
        scores = ImageLogitsProcessor(vocabulary)(ids, torch.zeros(1, rows))
        assert scores[:, vocabulary.size :].isneginf().all()
        assert scores.isfinite().any()


def test_neighbouring_codes_start_as_neighbours_when_the_codebook_is_wanted():
    tokenizer = tokenizer_of(VectorQuantizer(codebook_size=16, dim=4))
    model, vocabulary = extended(tokenizer, from_codebook=True)
    rows = model.get_input_embeddings().weight[vocabulary.starts[0] :].detach()
    table = tokenizer.quantizer.codebook.detach()
    # The projection is to more channels than the codebook has, so distances roughly stay.
    correlation = torch.corrcoef(torch.stack([torch.pdist(rows), torch.pdist(table / table.std(0))]))[0, 1]
    assert correlation > 0.7
    assert rows.std().item() == pytest.approx(model.get_input_embeddings().weight[:TEXT].std().item(), rel=0.5)


def test_a_codebook_that_is_none_cannot_be_a_start():
    with pytest.raises(ValueError, match="write from_codebook=False"):
        extended(tokenizer_of(GroupedQuantizer(FSQ(levels=[5, 3]), groups=2)), from_codebook=True)


def test_an_interleaved_sequence_gives_its_text_and_images_back(tokenizer):
    from vistok.tokens.huggingface import interleave, split_images

    _, vocabulary = extended(tokenizer)
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = tokenizer.flatten(tokenizer.encode(images).indices)
    sequence = interleave([[1, 5, 6], tokens[:1], torch.tensor([7]), tokens[1:], [2]], vocabulary)
    texts, found = split_images(sequence, vocabulary)
    assert [text.tolist() for text in texts] == [[1, 5, 6], [7], [2]]
    assert torch.equal(found, tokens)
    assert sequence.max() < vocabulary.size


def test_a_language_model_learns_from_an_interleaved_sequence(tokenizer):
    from vistok.tokens.huggingface import interleave

    model, vocabulary = extended(tokenizer)
    tokens = tokenizer.flatten(tokenizer.encode(torch.zeros(1, 3, 8, 12)).indices)
    sequence = interleave([[1, 5], tokens], vocabulary)[None]
    model(input_ids=sequence, labels=sequence).loss.backward()
    assert model.get_input_embeddings().weight.grad[vocabulary.begin].abs().sum() > 0


def test_generation_after_the_begin_mark_is_one_whole_image_then_text(tokenizer):
    from vistok.tokens.huggingface import ImageLogitsProcessor, split_images

    model, vocabulary = extended(tokenizer)
    length = vocabulary.layout.length
    prompt = torch.tensor([[1, 5, vocabulary.begin], [vocabulary.begin, *[vocabulary.starts[0]] * 2]])
    torch.manual_seed(0)
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        max_new_tokens=length + 4,
        min_new_tokens=length + 4,
        logits_processor=[ImageLogitsProcessor(vocabulary, allow_begin=False)],
    )
    texts, tokens = split_images(generated[0], vocabulary)
    assert tokens.shape == (1, length)
    assert (texts[1] < TEXT).all()
    images = tokenizer.decode_indices(tokenizer.unflatten(tokens), (8, 12))
    assert images.shape == (1, 3, 8, 12)


def test_a_model_that_begins_images_by_itself_draws_several_in_each_row_of_a_batch(tokenizer):
    from vistok.tokens.huggingface import ImageLogitsProcessor, split_images

    model, vocabulary = extended(tokenizer)
    length = vocabulary.layout.length
    # Padded on the left, one row inside an image already.
    prompt = torch.tensor([[0, 0, 1, 5], [0, 1, vocabulary.begin, vocabulary.starts[0]]])
    torch.manual_seed(0)
    generated = model.generate(
        prompt,
        attention_mask=(prompt > 0).long(),
        do_sample=True,
        max_new_tokens=2 * (length + 2),
        min_new_tokens=2 * (length + 2),
        sequence_bias=[[[vocabulary.begin], 50.0]],
        logits_processor=[ImageLogitsProcessor(vocabulary)],
    )
    for row in generated:
        texts, tokens = split_images(row, vocabulary)
        assert tokens.shape == (2, length)
        assert all((text < TEXT).all() for text in texts)
        images = tokenizer.decode_indices(tokenizer.unflatten(tokens, (8, 12)), (8, 12))
        assert images.shape == (2, 3, 8, 12)


def test_only_the_end_mark_follows_a_whole_image(tokenizer):
    from vistok.tokens.huggingface import ImageLogitsProcessor, interleave

    _, vocabulary = extended(tokenizer)
    tokens = tokenizer.flatten(tokenizer.encode(torch.zeros(1, 3, 8, 12)).indices)
    sequence = interleave([[1], tokens], vocabulary)[None, :-1]
    scores = ImageLogitsProcessor(vocabulary)(sequence, torch.zeros(1, vocabulary.size))
    assert scores.isfinite().nonzero().tolist() == [[0, vocabulary.end]]


def test_an_image_may_begin_in_text_only_if_allowed(tokenizer):
    from vistok.tokens.huggingface import ImageLogitsProcessor

    _, vocabulary = extended(tokenizer)
    for allowed in (True, False):
        scores = ImageLogitsProcessor(vocabulary, allowed)(torch.tensor([[1, 5]]), torch.zeros(1, vocabulary.size))
        assert bool(scores[0, vocabulary.begin].isfinite()) == allowed
        assert scores[0, :TEXT].isfinite().all()


def test_an_image_with_text_inside_is_an_error(tokenizer):
    from vistok.tokens.huggingface import split_images

    _, vocabulary = extended(tokenizer)
    sequence = torch.tensor([vocabulary.begin, *[5] * vocabulary.layout.length, vocabulary.end])
    with pytest.raises(ValueError, match="outside its codebooks"):
        split_images(sequence, vocabulary)


def test_an_image_without_its_end_is_an_error(tokenizer):
    from vistok.tokens.huggingface import interleave, split_images

    _, vocabulary = extended(tokenizer)
    tokens = tokenizer.flatten(tokenizer.encode(torch.zeros(1, 3, 8, 12)).indices)
    sequence = interleave([tokens, [5]], vocabulary)
    sequence[-2] = 7
    with pytest.raises(ValueError, match="mark of its end"):
        split_images(sequence, vocabulary)

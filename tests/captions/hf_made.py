"""Tiny models of transformers with random weights, saved as real ones are: a folder that the Auto classes load."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = (
    "a the dog cat ball red blue green on in with of and grass snow tree house car boat man woman child runs sits "
    "stands large small old picture describe image one sentence ? . , what does caption en near under over two three"
).split()
TURNS = ["user:", "assistant:"]
QWEN = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>", *TURNS, *QWEN]
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer(marks: bool = True, **options: Any) -> hf.PreTrainedTokenizerFast:
    """Words; marks: [CLS] and [SEP] round each text, as BERT has it."""
    vocabulary = {w: i for i, w in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    if marks:
        words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        bos_token="[CLS]", eos_token="[SEP]", **{"additional_special_tokens": ["<image>", *TURNS, *QWEN]} | options,
    )  # fmt: skip


VOCABULARY, IMAGE = len(SPECIAL) + len(WORDS), SPECIAL.index("<image>")
BERT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "initializer_range": 0.8, "pad_token_id": 0}  # fmt: skip
EYE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
       "patch_size": 8, "initializer_range": 0.4}  # fmt: skip
LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "intermediate_size": 64, "initializer_range": 0.6, "pad_token_id": 0,
         "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip


def blip(folder: Path) -> Path:
    text = BERT | {
        "bos_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "encoder_hidden_size": 32,
        "projection_dim": 16,
    }
    config = hf.BlipConfig(text_config=text, vision_config=EYE, projection_dim=16, image_text_hidden_size=16)
    processor = hf.BlipProcessor(hf.BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer())
    return _saved(hf.BlipForConditionalGeneration, config, processor, folder)


def git(folder: Path) -> Path:
    config = hf.GitConfig(vision_config=EYE, **BERT, bos_token_id=2, eos_token_id=3)
    eye = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _saved(hf.GitForCausalLM, config, hf.GitProcessor(eye, tokenizer()), folder)


def llava(folder: Path) -> Path:
    """A chat model that sees. Its text is padded, since its processor is given several sizes of text."""
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**EYE, projection_dim=16), text_config=hf.LlamaConfig(**LLAMA), image_token_index=IMAGE,
        vision_feature_layer=-1,
    )  # fmt: skip
    eye = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = hf.LlavaProcessor(
        eye, tokenizer(marks=False), patch_size=8, vision_feature_select_strategy="default", chat_template=CHAT,
        num_additional_image_tokens=1,
    )  # fmt: skip
    return _saved(hf.LlavaForConditionalGeneration, config, processor, folder)


def llama(folder: Path, chat: bool = True, template: str = CHAT) -> Path:
    """A language model."""
    words = tokenizer(marks=False, **({"chat_template": template} if chat else {}))
    return _saved(hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA), words, folder)


def gpt2(folder: Path, positions: int = 64) -> Path:
    """A language model with fixed positions."""
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=positions, n_embd=32, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=3,
        pad_token_id=0,
    )  # fmt: skip
    return _saved(hf.GPT2LMHeadModel, config, tokenizer(marks=False), folder)


def _saved(kind: Any, config: Any, processor: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def qwen2_vl(folder: Path, template: str = CHAT) -> Path:
    """A chat model whose pictures are as many tokens as they are large, so that the prompts of a batch are padded."""
    config = hf.Qwen2VLConfig(
        text_config=LLAMA | {"rope_parameters": {"type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2,
                       "initializer_range": 0.4},
        vision_start_token_id=SPECIAL.index("<|vision_start|>"), image_token_id=SPECIAL.index("<|image_pad|>"),
        vision_end_token_id=SPECIAL.index("<|vision_end|>"), video_token_id=SPECIAL.index("<|video_pad|>"),
    )  # fmt: skip
    eye = hf.Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 256, "longest_edge": 4096})
    chat = template.replace("<image> ", "<|vision_start|> <|image_pad|> <|vision_end|> ")
    words = tokenizer(marks=False)
    processor = hf.Qwen2VLProcessor(eye, words, hf.Qwen2VLVideoProcessor(patch_size=8), chat_template=chat)
    return _saved(hf.Qwen2VLForConditionalGeneration, config, processor, folder)


def blip2(folder: Path, **words: Any) -> Path:
    text = {"model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 64,
            "num_attention_heads": 2, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "pad_token_id": 0,
            "bos_token_id": 2, "eos_token_id": 3, "init_std": 0.6}  # fmt: skip
    query = BERT | {"num_hidden_layers": 1, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
    config = hf.Blip2Config(
        vision_config=EYE, qformer_config=query, text_config=text, num_query_tokens=4, image_token_index=IMAGE
    )
    eye = hf.BlipImageProcessor(size={"height": 32, "width": 32})
    processor = hf.Blip2Processor(eye, tokenizer(**words), num_query_tokens=4)
    return _saved(hf.Blip2ForConditionalGeneration, config, processor, folder)


def paligemma(folder: Path) -> Path:
    size = VOCABULARY + 1200  # its processor adds words for places and masks
    text = LLAMA | {"model_type": "gemma", "vocab_size": size, "head_dim": 16}
    config = hf.PaliGemmaConfig(
        vision_config=EYE | {"model_type": "siglip_vision_model", "projection_dim": 32}, text_config=text, vocab_size=size,
        image_token_index=IMAGE, projection_dim=32, hidden_size=32,
    )  # fmt: skip
    eye = hf.SiglipImageProcessor(size={"height": 32, "width": 32})
    eye.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(eye, tokenizer(marks=False))
    return _saved(hf.PaliGemmaForConditionalGeneration, config, processor, folder)


def florence2(folder: Path) -> Path:
    text = {"model_type": "bart", "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
            "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
            "decoder_start_token_id": 2, "init_std": 0.6}  # fmt: skip
    sight = {"model_type": "florence_vision", "depths": [1, 1], "embed_dim": [16, 32], "num_heads": [2, 2],
             "num_groups": [2, 2], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
             "patch_prenorm": [False, True], "window_size": 4, "projection_dim": 32}  # fmt: skip
    config = hf.Florence2Config(text_config=text, vision_config=sight, image_token_id=IMAGE)
    eye = hf.CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    eye.image_seq_length = 17
    processor = hf.Florence2Processor(eye, tokenizer(extra_special_tokens={"image_token": "<image>"}))
    return _saved(hf.Florence2ForConditionalGeneration, config, processor, folder)


def vit_gpt(folder: Path) -> Path:
    """An encoder and a decoder, with an image processor and a tokeniser side by side."""
    decoder = hf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**EYE), decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    tokenizer().save_pretrained(folder)
    return _saved(hf.VisionEncoderDecoderModel, config, hf.ViTImageProcessor(size={"height": 32, "width": 32}), folder)

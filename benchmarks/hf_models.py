"""Small transformers of every common kind, with random weights, masks of every kind, and example inputs.

Sizes are odd primes where the architecture lets them be, so that no two axes have the same size by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCAB, HIDDEN, HEADS, INNER, LAYERS = 211, 72, 4, 131, 2
BATCH, TOKENS = 3, 13
BASE = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
HEADED = BASE | {"num_attention_heads": HEADS}
ENCODER = HEADED | {"max_position_embeddings": 67}
DECODER = HEADED | {"max_position_embeddings": 67, "use_cache": False, "pad_token_id": 0}
GROUPED = DECODER | {"num_key_value_heads": 2}
VISION = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
          "num_attention_heads": HEADS, "image_size": 30, "patch_size": 10}  # fmt: skip

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """How to build one model and what to feed it.

    Attributes:
        build: makes the model with random weights.
        inputs: which of the arguments of `example` its forward takes.
        is_post_norm: norms stand in the residual stream, so that dead stream channels need dead norms too.
        width: channels of its residual stream, None when it has several.
        image: height and width of pictures.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[str, ...] = ("input_ids",)
    is_post_norm: bool = False
    width: int | None = HIDDEN
    image: int = 30


def _model(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Build ``hf.<name>(hf.<config>(**options))``; looked up late, so that one missing class is one missing row."""

    def build() -> nn.Module:
        model: nn.Module = getattr(hf, name)(getattr(hf, config)(**options))
        return model

    return build


TEXT2TEXT = ("input_ids", "decoder_input_ids")
TEXT_AND_MASK = ("input_ids", "attention_mask")
PICTURE = ("pixel_values",)

KINDS: dict[str, Kind] = {
    # ------------------------------------------------------------------ encoders of text
    "bert": Kind(_model("BertModel", "BertConfig", **ENCODER), TEXT_AND_MASK, True),
    "bert-mlm": Kind(_model("BertForMaskedLM", "BertConfig", **ENCODER), TEXT_AND_MASK, True),
    "distilbert": Kind(_model("DistilBertModel", "DistilBertConfig", vocab_size=VOCAB, dim=HIDDEN, n_heads=HEADS,
                              hidden_dim=INNER, n_layers=LAYERS, max_position_embeddings=67), TEXT_AND_MASK, True),
    "roberta": Kind(_model("RobertaForSequenceClassification", "RobertaConfig", **ENCODER), TEXT_AND_MASK, True),
    "electra": Kind(_model("ElectraModel", "ElectraConfig", **ENCODER, embedding_size=59), TEXT_AND_MASK, True),
    "albert": Kind(_model("AlbertModel", "AlbertConfig", **ENCODER, embedding_size=59), TEXT_AND_MASK, True),
    "deberta": Kind(_model("DebertaModel", "DebertaConfig", **ENCODER, relative_attention=True,
                           pos_att_type=["c2p", "p2c"]), TEXT_AND_MASK, True),
    "deberta-v2": Kind(_model("DebertaV2Model", "DebertaV2Config", **ENCODER, relative_attention=True,
                              position_buckets=7, share_att_key=True, norm_rel_ebd="layer_norm",
                              pos_att_type=["c2p", "p2c"]), TEXT_AND_MASK, True),
    "mpnet": Kind(_model("MPNetModel", "MPNetConfig", **ENCODER), TEXT_AND_MASK, True),
    "modernbert": Kind(_model("ModernBertModel", "ModernBertConfig", **ENCODER, pad_token_id=0,
                              bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2), TEXT_AND_MASK),
    "squeezebert": Kind(_model("SqueezeBertModel", "SqueezeBertConfig", **ENCODER | {"intermediate_size": 132}, embedding_size=HIDDEN),
                        TEXT_AND_MASK, True),
    "roformer": Kind(_model("RoFormerModel", "RoFormerConfig", **ENCODER, embedding_size=HIDDEN), TEXT_AND_MASK, True),
    "fnet": Kind(_model("FNetModel", "FNetConfig", **BASE, max_position_embeddings=67), ("input_ids",), True),
    # ------------------------------------------------------------------ decoders of text
    "gpt2": Kind(_model("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCAB, n_embd=HIDDEN, n_head=HEADS,
                        n_layer=LAYERS, n_inner=INNER, n_positions=67, use_cache=False)),
    "gpt-neo": Kind(_model("GPTNeoForCausalLM", "GPTNeoConfig", vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=2,
                           num_heads=HEADS, intermediate_size=INNER, attention_types=[[["global", "local"], 1]],
                           window_size=5, max_position_embeddings=67, use_cache=False)),
    "gptj": Kind(_model("GPTJForCausalLM", "GPTJConfig", vocab_size=VOCAB, n_embd=HIDDEN, n_head=HEADS,
                        n_layer=LAYERS, n_inner=INNER, n_positions=67, rotary_dim=6, use_cache=False)),
    "gpt-neox": Kind(_model("GPTNeoXForCausalLM", "GPTNeoXConfig", **DECODER)),
    "opt": Kind(_model("OPTForCausalLM", "OPTConfig", vocab_size=VOCAB, hidden_size=HIDDEN, ffn_dim=INNER,
                       num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=67,
                       word_embed_proj_dim=HIDDEN, use_cache=False)),
    "bloom": Kind(_model("BloomForCausalLM", "BloomConfig", vocab_size=VOCAB, hidden_size=HIDDEN, n_head=HEADS,
                         n_layer=LAYERS, use_cache=False)),
    "mpt": Kind(_model("MptForCausalLM", "MptConfig", vocab_size=VOCAB, d_model=HIDDEN, n_heads=HEADS,
                       n_layers=LAYERS, max_seq_len=67, use_cache=False)),
    "falcon-mq": Kind(_model("FalconForCausalLM", "FalconConfig", **DECODER, multi_query=True, alibi=False)),
    "falcon-grouped": Kind(_model("FalconForCausalLM", "FalconConfig", **DECODER, new_decoder_architecture=True,
                                  num_kv_heads=2, alibi=False)),
    "falcon-alibi": Kind(_model("FalconForCausalLM", "FalconConfig", **DECODER, multi_query=False, alibi=True)),
    "llama": Kind(_model("LlamaForCausalLM", "LlamaConfig", **GROUPED)),
    "llama-eager": Kind(_model("LlamaForCausalLM", "LlamaConfig", **GROUPED, attn_implementation="eager")),
    "mistral": Kind(_model("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=5)),
    "qwen2": Kind(_model("Qwen2ForCausalLM", "Qwen2Config", **GROUPED)),
    "qwen3": Kind(_model("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=22)),
    "gemma": Kind(_model("GemmaForCausalLM", "GemmaConfig", **GROUPED, head_dim=22)),
    "gemma2": Kind(_model("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=22, sliding_window=5)),
    "gemma3": Kind(_model("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, head_dim=22, sliding_window=5)),
    "phi": Kind(_model("PhiForCausalLM", "PhiConfig", **DECODER, partial_rotary_factor=1 / 3)),
    "phi3": Kind(_model("Phi3ForCausalLM", "Phi3Config", **GROUPED)),
    "stablelm": Kind(_model("StableLmForCausalLM", "StableLmConfig", **GROUPED)),
    "olmo2": Kind(_model("Olmo2ForCausalLM", "Olmo2Config", **GROUPED)),
    "cohere": Kind(_model("CohereForCausalLM", "CohereConfig", **GROUPED)),
    "starcoder2": Kind(_model("Starcoder2ForCausalLM", "Starcoder2Config", **GROUPED)),
    "mixtral": Kind(_model("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=3,
                           num_experts_per_tok=2)),
    "qwen2-moe": Kind(_model("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **GROUPED, num_experts=3,
                             num_experts_per_tok=2, moe_intermediate_size=37, shared_expert_intermediate_size=41)),
    "mamba": Kind(_model("MambaForCausalLM", "MambaConfig", vocab_size=VOCAB, hidden_size=HIDDEN, state_size=7,
                         num_hidden_layers=LAYERS, use_cache=False)),
    "xglm": Kind(_model("XGLMForCausalLM", "XGLMConfig", vocab_size=VOCAB, d_model=HIDDEN, ffn_dim=INNER,
                        num_layers=LAYERS, attention_heads=HEADS, max_position_embeddings=67, use_cache=False)),
    # ------------------------------------------------------------------ encoder and decoder
    "t5": Kind(_model("T5ForConditionalGeneration", "T5Config", vocab_size=VOCAB, d_model=HIDDEN, d_kv=17, d_ff=INNER,
                      num_layers=LAYERS, num_heads=HEADS, use_cache=False, decoder_start_token_id=0), TEXT2TEXT),
    "t5-gated": Kind(_model("T5ForConditionalGeneration", "T5Config", vocab_size=VOCAB, d_model=HIDDEN, d_kv=17,
                            d_ff=INNER, num_layers=LAYERS, num_heads=HEADS, use_cache=False, decoder_start_token_id=0,
                            feed_forward_proj="gated-gelu", tie_word_embeddings=False), TEXT2TEXT),
    "bart": Kind(_model("BartForConditionalGeneration", "BartConfig", vocab_size=VOCAB, d_model=HIDDEN,
                        encoder_layers=2, decoder_layers=2, encoder_attention_heads=HEADS,
                        decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER,
                        max_position_embeddings=67, use_cache=False), TEXT2TEXT, True),
    "pegasus": Kind(_model("PegasusForConditionalGeneration", "PegasusConfig", vocab_size=VOCAB, d_model=HIDDEN,
                           encoder_layers=2, decoder_layers=2, encoder_attention_heads=HEADS,
                           decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER,
                           max_position_embeddings=67, use_cache=False), TEXT2TEXT),
    "whisper": Kind(_model("WhisperForConditionalGeneration", "WhisperConfig", vocab_size=VOCAB, d_model=HIDDEN,
                           encoder_layers=2, decoder_layers=2, encoder_attention_heads=HEADS,
                           decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER,
                           num_mel_bins=11, max_source_positions=23, max_target_positions=29, use_cache=False,
                           pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
                    ("input_features", "decoder_input_ids")),
    # ------------------------------------------------------------------ pictures, and pictures with text
    "clip": Kind(_model("CLIPModel", "CLIPConfig", text_config=ENCODER, vision_config=VISION, projection_dim=37),
                 ("input_ids", "pixel_values")),
    "siglip": Kind(_model("SiglipModel", "SiglipConfig", text_config=ENCODER | {"projection_size": HIDDEN},
                          vision_config=VISION), ("input_ids", "pixel_values")),
    "vit": Kind(_model("ViTForImageClassification", "ViTConfig", **VISION, num_labels=11), PICTURE),
    "deit": Kind(_model("DeiTForImageClassificationWithTeacher", "DeiTConfig", **VISION, num_labels=11), PICTURE),
    "beit": Kind(_model("BeitForImageClassification", "BeitConfig", **VISION, num_labels=11,
                        use_relative_position_bias=True), PICTURE),
    "dinov2": Kind(_model("Dinov2ForImageClassification", "Dinov2Config", hidden_size=HIDDEN, mlp_ratio=2,
                          num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=30, patch_size=10,
                          num_labels=11), PICTURE),
    "vit-mae": Kind(_model("ViTMAEModel", "ViTMAEConfig", **VISION, mask_ratio=0.0), (*PICTURE, "noise")),
    "swin": Kind(_model("SwinForImageClassification", "SwinConfig", image_size=56, patch_size=4, embed_dim=24,
                        depths=[2, 2], num_heads=[2, 4], window_size=7, num_labels=11), PICTURE, False, None, 56),
    "swinv2": Kind(_model("Swinv2ForImageClassification", "Swinv2Config", image_size=56, patch_size=4, embed_dim=24,
                          depths=[2, 2], num_heads=[2, 4], window_size=7, num_labels=11), PICTURE, True, None, 56),
    "segformer": Kind(_model("SegformerForSemanticSegmentation", "SegformerConfig", num_encoder_blocks=2,
                             depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[22, 46], patch_sizes=[7, 3],
                             strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[3, 3], decoder_hidden_size=31,
                             num_labels=11), PICTURE, False, None, 32),
    "pvt": Kind(_model("PvtForImageClassification", "PvtConfig", image_size=32, num_encoder_blocks=2, depths=[1, 1],
                       sequence_reduction_ratios=[2, 1], hidden_sizes=[22, 46], patch_sizes=[4, 2], strides=[4, 2],
                       num_attention_heads=[1, 2], mlp_ratios=[3, 3], num_labels=11), PICTURE, False, None, 32),
    "detr": Kind(_model("DetrForObjectDetection", "DetrConfig", use_timm_backbone=False, backbone=None,
                        use_pretrained_backbone=False, backbone_config={
                            "model_type": "resnet", "embedding_size": 10, "hidden_sizes": [12, 16, 20, 24],
                            "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage4"]},
                        d_model=HIDDEN, encoder_layers=1, decoder_layers=2, encoder_attention_heads=HEADS,
                        decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, num_queries=7,
                        num_labels=11), PICTURE, True, None, 64),
    "convnextv2": Kind(_model("ConvNextV2ForImageClassification", "ConvNextV2Config", hidden_sizes=[22, 46],
                              depths=[2, 2], num_stages=2, num_labels=11), PICTURE, False, None, 32),
    "resnet": Kind(_model("ResNetForImageClassification", "ResNetConfig", embedding_size=13, hidden_sizes=[20, 28],
                          depths=[2, 2], num_labels=11), PICTURE, False, None, 32),
    "mobilevit": Kind(_model("MobileViTForImageClassification", "MobileViTConfig", image_size=128,
                             hidden_sizes=[36, 44, 52], neck_hidden_sizes=[8, 12, 16, 20, 24, 28, 76],
                             num_attention_heads=2, num_labels=11), PICTURE, False, None, 128),
    "poolformer": Kind(_model("PoolFormerForImageClassification", "PoolFormerConfig", hidden_sizes=[10, 14, 18, 22],
                              depths=[1, 1, 1, 1], num_labels=11), PICTURE, False, None, 64),
    # ------------------------------------------------------------------ sound
    "wav2vec2": Kind(_model("Wav2Vec2Model", "Wav2Vec2Config", **HEADED, conv_dim=[13, 17], conv_stride=[5, 2],
                            conv_kernel=[10, 3], num_feat_extract_layers=2, num_conv_pos_embeddings=8,
                            num_conv_pos_embedding_groups=4, mask_time_prob=0.0), ("input_values",), True),
    "hubert": Kind(_model("HubertModel", "HubertConfig", **HEADED, conv_dim=[13, 17], conv_stride=[5, 2],
                          conv_kernel=[10, 3], num_feat_extract_layers=2, num_conv_pos_embeddings=8,
                          num_conv_pos_embedding_groups=4, mask_time_prob=0.0), ("input_values",), True),
    "ast": Kind(_model("ASTForAudioClassification", "ASTConfig", hidden_size=HIDDEN, intermediate_size=INNER,
                       num_hidden_layers=LAYERS, num_attention_heads=HEADS, patch_size=4, frequency_stride=4,
                       time_stride=4, max_length=20, num_mel_bins=12, num_labels=11), ("ast_values",)),
}  # fmt: skip


def example(kind: Kind, batch: int = BATCH, tokens: int = TOKENS, seed: int = 0) -> Inputs:
    """Random inputs, floats in float64."""
    g = torch.Generator().manual_seed(1000 + seed)

    def ids(n: int) -> Tensor:
        return torch.randint(3, VOCAB, (batch, n), generator=g)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=g, dtype=torch.float64)

    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, tokens - 3 :] = 0
    every: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: ids(tokens),
        "attention_mask": lambda: mask,
        "decoder_input_ids": lambda: ids(7),
        "pixel_values": lambda: noise(3, kind.image, kind.image),
        "noise": lambda: noise(9),
        "input_features": lambda: noise(11, 46),
        "input_values": lambda: noise(173),
        "ast_values": lambda: noise(20, 12),
    }
    return {{"ast_values": "input_values"}.get(name, name): every[name]() for name in kind.inputs}


def build(kind: Kind, seed: int = 0) -> nn.Module:
    """The model in eval mode and float64, every parameter random (no zero biases, no norms that do nothing)."""
    torch.manual_seed(seed)
    model = kind.build().double().eval()
    g = torch.Generator().manual_seed(seed)

    def rnd(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=g, dtype=torch.float64)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p.copy_((1 + 0.2 * rnd(p)) if name.endswith("weight") else 0.3 * rnd(p))
            else:
                fan_in = p.shape[0] if type(_owner(model, name)).__name__ == "Conv1D" else p[0].numel()
                p.copy_(rnd(p) / max(fan_in, 1) ** 0.5)
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                assert m.running_mean is not None
                assert m.running_var is not None
                m.running_mean.copy_(0.3 * rnd(m.running_mean))
                m.running_var.copy_(1 + rnd(m.running_var).abs())
    return model


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


# ---------------------------------------------------------------------- masks
_OUT = ("o_proj", "out_proj", "attention.output.dense", "attn.c_proj", "out_lin", "self_attention.dense",
        "attention.dense", "attn.out_proj", "EncDecAttention.o", "SelfAttention.o", "attn.o")  # fmt: skip
_HEAD = ("lm_head", "classifier", "decoder.linear_pred", "class_labels_classifier")


@torch.no_grad()
def mask(kind: Kind, model: nn.Module, seed: int = 0) -> None:
    """Zeros of every kind, in place.

    Every projection: 30 % dead rows (their biases stay), 20 % dead columns, half of the rest at random.  Where an
    attention has an output projection, the columns of its first head go.  A fifth of the channels of the residual
    stream is zero in whatever writes a stream of that width, in norms only where they stand in the stream.
    """
    g = torch.Generator().manual_seed(99 + seed)
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, m in model.named_modules():
        weight = _matrix(m)
        if weight is None or id(getattr(m, "weight", None)) in tied:
            continue
        rows, columns = weight.shape[0], weight.shape[1]
        ends = name.rsplit(".", 1)[-1]
        if not any(ends == h for h in _HEAD):
            weight[torch.randperm(rows, generator=g)[: rows * 3 // 10]] = 0
        if getattr(m, "groups", 1) == 1 and columns > 3:
            weight[:, torch.randperm(columns, generator=g)[: columns // 5]] = 0
        weight *= (torch.rand(weight.shape, generator=g) > 0.5).to(weight)
        if name.endswith(_OUT) and columns % HEADS == 0:
            weight[:, : columns // HEADS] = 0
    for p in _experts(model):
        p[:, torch.randperm(p.shape[1], generator=g)[: p.shape[1] // 5]] = 0  # in every expert
        p *= (torch.rand(p.shape, generator=g) > 0.5).to(p)
    if kind.width is not None:
        _kill_stream(model, kind, torch.randperm(kind.width, generator=g)[: kind.width // 5])


def _experts(model: nn.Module) -> list[Tensor]:
    """Matrices [experts, rows, columns] of mixtures of experts."""
    return [p for n, p in model.named_parameters() if ".experts." in n and p.dim() == 3]


def _matrix(m: nn.Module) -> Tensor | None:
    """The weight as [rows, columns, ..], a view, if the module is a projection."""
    if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)) and not hasattr(m, "parametrizations"):
        return m.weight
    if type(m).__name__ == "Conv1D":
        assert isinstance(m.weight, Tensor)
        return m.weight.t()
    return None


def _kill_stream(model: nn.Module, kind: Kind, channels: Tensor) -> None:
    width = kind.width
    for m in model.modules():
        weight, bias = _matrix(m), getattr(m, "bias", None)
        if weight is not None and weight.shape[0] == width:
            weight[channels] = 0
            if bias is not None:
                bias[channels] = 0
        elif isinstance(m, nn.Embedding) and m.embedding_dim == width:
            m.weight[:, channels] = 0
        elif kind.is_post_norm and isinstance(m, nn.LayerNorm) and tuple(m.weight.shape) == (width,):
            m.weight[channels] = 0
            if bias is not None:
                bias[channels] = 0
    for p in _experts(model):
        if p.shape[1] == width:
            p[:, channels] = 0
    for p in model.parameters():
        if p.dim() == 3 and p.shape[-1] == width and p.shape[0] == 1:  # class tokens, position tables
            p[..., channels] = 0

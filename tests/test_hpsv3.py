"""HPSv3 on a tiny random Qwen2-VL in the checkpoint's own key layout, against a pass by hand."""

import json
import math
import unittest.mock

import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import rewards
from test_equivalence import close, gen

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
WORDS = "user assistant judge this image of a red fox two cats how good is it now".split()
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
PACKAGE = (
    '"""A module that cannot be imported."""\n'
    "import a_package_that_is_not_there\n"
    'INSTRUCTION = "judge this image of {text_prompt} "\n'
    'INSTRUCTION_debug = "{text_prompt}"\n'
    "SIZES = [1, 2]\n"
    'prompt_with_special_token = "how good is it now <|Reward|>"\n'
)
PROMPTS = ["a red fox", "two cats"]  # of different lengths: the second is padded


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
        padding_side="left",  # the reward has to ask for the right side
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_config(vocabulary: int):
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(num_key_value_heads=1, vocab_size=vocabulary, max_position_embeddings=2048)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2)
    tokens = {"vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 5}
    return transformers.Qwen2VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision,
        video_token_id=6,
        **tokens,
    )


def old_layout(model, generator) -> dict[str, torch.Tensor]:
    """Keys as in HPSv3.safetensors: visual.*, model.*, lm_head.weight, rm_head.{0,3,5}.*."""
    state = {}
    for name, tensor in model.state_dict().items():
        state[name.replace("language_model.", "model.", 1)] = tensor.clone()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    for number, (outputs, inputs) in {0: (24, 32), 3: (16, 24), 5: (2, 16)}.items():
        weight = torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)
        state[f"rm_head.{number}.weight"] = weight
        state[f"rm_head.{number}.bias"] = torch.randn(outputs, generator=generator)
    return state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a checkpoint, its state dict and its config."""
    folder = tmp_path_factory.mktemp("hpsv3")
    tokenizer = tiny_tokenizer()
    config = tiny_config(len(tokenizer) + 9)  # Qwen's own vocabulary is padded
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer) + 1  # <|Reward|>, and no padding
    torch.manual_seed(0)
    model = transformers.Qwen2VLModel(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.6)  # sharp attention: positions and pixels matter
    state = old_layout(model, torch.Generator().manual_seed(1))
    safetensors.torch.save_file(state, folder / "HPSv3.safetensors", {"format": "pt"})
    return folder, state, config


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package hpsv3 that cannot be imported, with the two texts."""
    module = tmp_path / "hpsv3/dataset/data_collator_qwen.py"
    module.parent.mkdir(parents=True)
    module.write_text(PACKAGE)
    (tmp_path / "hpsv3/__init__.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return module


def copied(checkpoint, folder, state=None, left_out="nothing"):
    """Another folder with the checkpoint's files and, if given, another state dict."""
    for file in checkpoint[0].iterdir():
        if left_out not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    if state is not None:
        safetensors.torch.save_file(state, folder / "HPSv3.safetensors", {"format": "pt"})
    return folder


def load(folder):
    return rewards.load_rewards(f"hpsv3@{folder}=1")[0]["hpsv3"]


def score(function, images, prompts):
    lines = [{"prompt": prompt} for prompt in prompts]
    found = rewards.compute_rewards({"hpsv3": function}, images, lines)["hpsv3"]
    return found.double()


def noise(number: int, *shape: int):
    """Images whose values are whole 8-bit numbers, so that a PIL path rounds nothing."""
    return torch.randint(0, 256, (number, 3, *shape), generator=gen(shape[0])) / 255


def gradient(height: int, width: int):
    """A smooth image, of whole 8-bit numbers."""
    x = torch.linspace(0, 1, width).expand(height, width)
    y = torch.linspace(0, 1, height)[:, None].expand(height, width)
    return (torch.stack([x, y, 1 - x * y])[None] * 255).round() / 255


def old_backbone(checkpoint):
    """The backbone in float64, with the frequencies that `model.to(bfloat16)` left in version 4."""
    _, state, config = checkpoint
    model = transformers.Qwen2VLModel(config).double().eval()
    new = {}
    for name, tensor in state.items():
        if name.startswith(("visual.", "model.")):
            new[name.replace("model.", "language_model.", 1)] = tensor.double()
    model.load_state_dict(new)
    for module in model.modules():
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            module.inv_freq = module.inv_freq.bfloat16().double()
    return model


def pil_processor():
    pixels = 256 * 28**2
    return Qwen2VLImageProcessorPil(size=dict(shortest_edge=pixels, longest_edge=pixels))


def seen_by(function):
    """A spy on what the backbone is called with."""
    forward = function.model.forward
    return unittest.mock.patch.object(function.model, "forward", wraps=forward)


def by_hand(checkpoint, images, prompts, sequential=True):
    """Scores by the hub's PIL processor and a float64 pass, one image at a time."""
    state = checkpoint[1]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens("<|Reward|>", special_tokens=True)
    model = old_backbone(checkpoint)
    processor = pil_processor()
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        array = (image * 255).round().byte().permute(1, 2, 0).numpy()
        seen = processor(Image.fromarray(array), return_tensors="pt")
        grid = seen["image_grid_thw"]
        pads = "<|image_pad|>" * (int(grid.prod()) // 4)
        text = f"<|im_start|>user <|vision_start|>{pads}<|vision_end|>judge this image of {prompt} "
        text += "how good is it now <|Reward|><|im_end|><|im_start|>assistant "
        ids = tokenizer(text, return_tensors="pt").input_ids
        positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
        if not sequential:
            positions, _ = model.get_rope_index(ids, (ids == 5).int(), grid)
        inputs = dict(pixel_values=seen["pixel_values"].double(), image_grid_thw=grid)
        with torch.no_grad():
            out = model(input_ids=ids, position_ids=positions, **inputs)
        x = out.last_hidden_state[0, ids[0].tolist().index(len(tokenizer) - 1)]
        for number in (0, 3, 5):
            weight = state[f"rm_head.{number}.weight"].double()
            x = weight @ x + state[f"rm_head.{number}.bias"].double()
            if number < 5:
                x = x.clamp(min=0)
        scores.append(x[0])
    return torch.stack(scores)


def test_scores_are_those_of_a_pass_by_hand(checkpoint, package):
    """score = mu of the head at <|Reward|>, positions 0, 1, 2, ...: not M-RoPE's."""
    images = noise(2, 448, 448)  # the size that it scores: nothing is resized
    found = score(load(checkpoint[0]), images, PROMPTS)
    expected = by_hand(checkpoint, images, PROMPTS)
    close(found, expected, 1e-4, "hpsv3 against a pass by hand")
    default = by_hand(checkpoint, images, PROMPTS, sequential=False)
    assert (default - expected).abs().min() > 1e-2, "version 5's own positions score otherwise"
    assert (expected[0] - expected[1]).abs() > 1e-2


SIZES = [(512, 512), (720, 720), (768, 768), (1024, 1024), (256, 256), (512, 768), (768, 320)]


@pytest.mark.parametrize("shape", SIZES)
def test_other_sizes_score_as_through_the_processor(checkpoint, package, shape):
    images = gradient(*shape)
    found = score(load(checkpoint[0]), images, PROMPTS[:1])
    expected = by_hand(checkpoint, images, PROMPTS[:1])
    close(found, expected, 0.005, f"hpsv3 at {shape}, through 8-bit PIL")


@pytest.mark.parametrize("shape", SIZES)
def test_patches_equal_the_processors_pil_path(checkpoint, package, shape):
    """Resized, normalised, cut into patches and put in their order, for two images at once."""
    small = torch.rand(2, 3, 12, 16, generator=gen(5))
    images = torch.nn.functional.interpolate(small, shape, mode="bicubic").clamp(0, 1)
    images = (images * 255).round() / 255
    function = load(checkpoint[0])
    with seen_by(function) as forward:
        score(function, images, PROMPTS)
    asked = forward.call_args.kwargs
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    expected = pil_processor()([Image.fromarray(array) for array in arrays], return_tensors="pt")
    assert torch.equal(asked["image_grid_thw"], expected["image_grid_thw"])
    close(asked["pixel_values"], expected["pixel_values"], 0.03, f"patches from {shape}")


def test_512_pixels_become_448_and_768_become_420(checkpoint, package):
    """256 tokens of 28 x 28 pixels, rounded down; as the published package does."""
    function = load(checkpoint[0])
    for side, expected in ((512, 448), (720, 448), (1024, 448), (768, 420)):
        spy = unittest.mock.patch.object(rewards, "model_pixels", wraps=rewards.model_pixels)
        with spy as resized:
            score(function, gradient(side, side), PROMPTS[:1])
        assert resized.call_args.kwargs["size"] == dict(height=expected, width=expected)


def test_a_batch_scores_as_its_images_do_alone(checkpoint, package):
    images = noise(3, 448, 448)
    prompts = [*PROMPTS, "a fox"]
    function = load(checkpoint[0])
    together = score(function, images, prompts)
    pairs = zip(images.split(1), prompts, strict=True)
    alone = torch.cat([score(function, image, [prompt]) for image, prompt in pairs])
    close(alone, together, 1e-5, "one by one")
    swapped = score(function, images.flip(0), prompts[::-1]).flip(0)
    close(swapped, together, 1e-5, "in another order")


def test_the_model_is_asked_as_it_was_trained(checkpoint, package):
    """Padding on the right, positions from 0 in all three rows, the image before the question."""
    function = load(checkpoint[0])
    with seen_by(function) as forward:
        score(function, noise(2, 448, 448), PROMPTS)
    asked = forward.call_args.kwargs
    length = asked["input_ids"].shape[1]
    assert asked["attention_mask"].tolist() == [[1] * length, [1] * (length - 1) + [0]]
    assert asked["input_ids"][1, -1] == function.tokenizer.pad_token_id
    assert torch.equal(asked["position_ids"], torch.arange(length).expand(3, 2, length))
    text = function.tokenizer.decode(asked["input_ids"][0])
    text = " ".join(text.replace("<|", " <|").replace("|>", "|> ").split())
    pads = " ".join(["<|image_pad|>"] * 256)
    assert text == (
        f"<|im_start|> user <|vision_start|> {pads} <|vision_end|> judge this image of a red fox "
        "how good is it now <|Reward|> <|im_end|> <|im_start|> assistant"
    )


def test_with_cuda_the_backbone_is_bf16_and_the_head_fp32(checkpoint, package):
    with unittest.mock.patch.object(torch.cuda, "is_available", lambda: True):
        function = load(checkpoint[0])
    assert {weight.dtype for weight in function.model.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in function.head.parameters()} == {torch.float32}
    assert not function.model.training
    assert not any(weight.requires_grad for weight in function.parameters())
    tables = {buffer.dtype for buffer in function.model.buffers()}
    assert tables == {torch.float32}, "version 4 multiplied positions in fp32, too"
    images = noise(2, 448, 448)
    found = score(function, images, PROMPTS)
    close(found, by_hand(checkpoint, images, PROMPTS), 0.1, "hpsv3 in bf16")


PLANTED = {  # what the error names
    "missing layer": "model.layers.1.mlp.up_proj.weight",
    "missing embedding": "model.embed_tokens.weight",
    "missing patch": "visual.patch_embed.proj.weight",
    "missing head": "rm_head.3.bias",
    "extra layer": "model.layers.7.mlp.up_proj.weight",
    "extra visual": "visual.another.weight",
    "extra head": "rm_head.6.weight",
    "extra part": "another.weight",
    "wrong shape": "model.norm.weight",
}


@pytest.mark.parametrize("change", PLANTED)
def test_a_planted_key_is_one_sentence(checkpoint, package, tmp_path, change):
    state = dict(checkpoint[1])
    key = PLANTED[change]
    if change.startswith("missing"):
        del state[key]
    else:
        assert (key in state) == (change == "wrong shape")
        state[key] = torch.zeros(2)
    with pytest.raises(rewards.UserError) as error:
        load(copied(checkpoint, tmp_path, state))
    message = str(error.value)
    assert message.startswith("reward hpsv3: ") and "cannot be loaded" in message
    assert "\n" not in message
    if change != "wrong shape":
        assert key.removeprefix("rm_head.").removeprefix("model.") in message


def test_a_missing_language_head_does_not_matter(checkpoint, package, tmp_path):
    """It makes words, and no word is made."""
    state = dict(checkpoint[1])
    del state["lm_head.weight"]
    function = load(copied(checkpoint, tmp_path, state))
    images = noise(1, 448, 448)
    expected = score(load(checkpoint[0]), images, PROMPTS[:1])
    close(score(function, images, PROMPTS[:1]), expected, 0.0, "without lm_head")


@pytest.mark.parametrize("file", ["HPSv3.safetensors", "tokenizer.json", "chat_template", "config"])
def test_a_missing_file_is_one_sentence(checkpoint, package, tmp_path, file):
    folder = copied(checkpoint, tmp_path, left_out=file)
    with pytest.raises(rewards.UserError, match=r"reward hpsv3: .*cannot be loaded") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_one_sentence(checkpoint, package, tmp_path):
    folder = copied(checkpoint, tmp_path)
    whole = (folder / "HPSv3.safetensors").read_bytes()
    (folder / "HPSv3.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(rewards.UserError, match=r"hpsv3: .*HPSv3\.safetensors cannot be loaded"):
        load(folder)


def test_without_its_package_one_sentence_says_so(checkpoint):
    with pytest.raises(
        rewards.UserError, match=r"pip install --no-deps hpsv3==1\.0\.0\.$"
    ) as error:
        load(checkpoint[0])
    assert "\n" not in str(error.value)


def test_another_version_of_its_package_is_the_same_sentence(checkpoint, package):
    package.write_text('INSTRUCTION = "{text_prompt}"\n')
    with pytest.raises(rewards.UserError, match=r"pip install --no-deps hpsv3==1\.0\.0\.$"):
        load(checkpoint[0])


def test_the_question_is_both_texts_in_their_order(package):
    assert rewards.hpsv3_question() == (
        "judge this image of {text_prompt} how good is it now <|Reward|>"
    )


def test_a_prompt_with_the_reward_token_is_refused_by_name(checkpoint, package):
    with pytest.raises(rewards.UserError, match=r'"hpsv3" returned shape \(2,\).*a fox'):
        score(load(checkpoint[0]), noise(1, 448, 448), ["a fox <|Reward|>"])


def test_the_checkpoints_layout_is_the_original_one(checkpoint):
    """Prefixes as the published file has them, the vocabulary with one token more than Qwen's."""
    folder, state, _ = checkpoint
    prefixes = {name.split(".")[0] for name in state}
    assert prefixes == {"visual", "model", "lm_head", "rm_head"}
    words = len(SPECIAL + WORDS)
    assert len(state["model.embed_tokens.weight"]) == words + 1
    saved = json.loads((folder / "config.json").read_text())
    assert saved["text_config"]["vocab_size"] == words + 9

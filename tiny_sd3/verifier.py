"""The rules of the reward `shapes`: which objects an image of the bundled world shows, and which of
a prompt's clauses hold for them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards import SIDES

GROUND = (240, 240, 235)  # RGB of the empty canvas
PALETTE = {
    "red": (220, 40, 40), "green": (40, 170, 70),
    "blue": (40, 70, 230), "yellow": (240, 200, 20),
    "purple": (170, 40, 200), "cyan": (30, 200, 220),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
MIN_COVERAGE = 0.5  # of a pixel by its object: anti-aliased edges belong to it from half on
MIN_COSINE = 0.9  # of a pixel's hue to a colour's; two colours of the palette are below 0.9
MIN_DISTANCE = 0.4  # of another colour to the ground, RGB in [0, 1], to be an object's
MIN_AREA = 0.006  # of the image, 25 px of 64 x 64: less is decoder noise; objects have 128 and more
FILL = (0.66, 0.89)  # area / bounding box, between triangle (drawn: 0.53), circle pi/4 and square 1
MAX_ASPECT = 1.35  # longer side of the bounding box over the shorter; all three shapes are 1


def clauses(objects: list[tuple], include: list[dict]) -> list[bool]:
    """The yes/no questions that a prompt asks of an image, answered for what find_objects found.
    include: GenEval's [{"class", "color", "count", "position": [side, index]?}].  Is the total
    number of objects right; are all their colours asked for, and all their shapes; for each entry,
    are there exactly `count` with both, and does its position hold (on the axis on which they are
    further apart)?  No question is easier to satisfy with more objects: where one was ("is any
    object red?"), reinforcement learning drew more of them."""
    held = [len(objects) == sum(item["count"] for item in include)]
    for column, key in enumerate(("color", "class")):
        names = {found[column] for found in objects}
        held.append(bool(names) and names <= {item[key] for item in include})
    centres: list[list[float]] = []
    for item in include:
        wanted = (item["color"], item["class"])
        same = [found[2:] for found in objects if found[:2] == wanted]
        held.append(len(same) == item["count"])
        axes = zip(*same, strict=True)
        centres.append([sum(axis) / len(same) for axis in axes])
    for here, item in zip(centres, include, strict=True):
        if "position" in item:
            side, index = item["position"]
            there = centres[index]
            dx = dy = 0.0  # an object that is missing is on no side
            if here and there:
                dx, dy = here[0] - there[0], here[1] - there[1]
            along, across = (dx, dy) if SIDES[side][0] else (dy, dx)
            held.append(along * sum(SIDES[side]) > abs(across))
    return held


def find_objects(images: Tensor) -> list[list[tuple]]:
    """Segments images of the bundled world, (N, 3, H, W) in [0, 1], into objects.
    Returns (colour, shape, x, y) of each, by image: names or "?"; the centre, in pixels."""
    N, _, H, W = images.shape
    colour = pixel_colours(images)
    label = connected_components(colour).flatten()
    colour = colour.flatten()
    pixel = torch.nonzero(colour >= 0).squeeze(1)
    root, region, area = label[pixel].unique(return_inverse=True, return_counts=True)
    zero = torch.zeros(len(area), device=images.device)
    lengths, centres = [], []
    for axis in (pixel % W, pixel // W % H):
        position = axis.float()
        first = zero.scatter_reduce(0, region, position, "amin", include_self=False)
        last = zero.scatter_reduce(0, region, position, "amax", include_self=False)
        lengths.append(last - first + 1)
        centres.append(zero.index_add(0, region, position) / area)
    width, height = lengths
    fill = area / (width * height)
    shape = torch.full_like(root, SHAPES.index("circle"))
    shape[fill < FILL[0]] = SHAPES.index("triangle")
    shape[fill > FILL[1]] = SHAPES.index("square")
    shape[torch.maximum(width / height, height / width) > MAX_ASPECT] = len(SHAPES)
    large = area >= MIN_AREA * H * W
    kinds = torch.stack([root, colour[root], shape], dim=1)[large].tolist()
    places = torch.stack(centres, dim=1)[large].tolist()
    colours, names = (*PALETTE, "?"), (*SHAPES, "?")
    objects: list[list] = [[] for _ in range(N)]
    for (number, c, s), place in zip(kinds, places, strict=True):
        objects[number // (H * W)].append((colours[c], names[s], *place))
    return objects


def pixel_colours(images: Tensor) -> Tensor:
    """Colour of each pixel, (N, H, W): an index of PALETTE, its length = another, -1 = ground.
    An anti-aliased pixel is ground + coverage * (colour - ground): hence its direction."""
    palette = torch.tensor(list(PALETTE.values()), device=images.device) / 255
    ground = torch.tensor(GROUND, device=images.device) / 255
    direction = palette - ground
    offset = images.float() - ground.view(3, 1, 1)
    distance = offset.square().sum(dim=1).sqrt()  # norm(dim=1) takes ten times as long on the CPU
    along = torch.einsum("nchw,kc->nkhw", offset, F.normalize(direction, dim=1))
    projection, colour = along.max(dim=1)
    coverage = projection / direction.norm(dim=1)[colour]
    known = projection / distance.clamp_min(1e-6) >= MIN_COSINE
    strong = torch.where(known, coverage > MIN_COVERAGE, distance > MIN_DISTANCE)
    colour = torch.where(known, colour, len(PALETTE))
    return torch.where(strong, colour, -1)


def connected_components(colour: Tensor) -> Tensor:
    """Labels the 4-connected regions of equal colour, (N, H, W) int, < 0 = background.
    Returns the largest flat index in the pixel's region, (N, H, W).  A pixel takes its equal
    neighbours' largest label, then its label's label."""
    label = torch.arange(colour.numel(), device=colour.device).view_as(colour)
    right, below = colour[:, :, 1:], colour[:, 1:]
    same_right = (colour.diff(dim=2) == 0) & (right >= 0)
    same_below = (colour.diff(dim=1) == 0) & (below >= 0)
    while True:
        new = label.clone()
        for axis, same in ((2, same_right), (1, same_below)):
            size = same.shape[axis]
            here, beside = new.narrow(axis, 0, size), new.narrow(axis, 1, size)
            torch.maximum(here, torch.where(same, beside, here), out=here)
            torch.maximum(beside, torch.where(same, here, beside), out=beside)
        for _ in range(3):
            new = new.view(-1)[new]
        if torch.equal(new, label):
            return label
        label = new

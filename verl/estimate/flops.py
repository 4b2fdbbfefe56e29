"""Floating-point operations of passes of a decoder, as pure functions of its sizes."""

from verl.estimate.memory import Role, Sizes


def layer_flops(sizes: Sizes, tokens: float, length: float) -> float:
    """FLOPs of all layers in a forward pass over `tokens` in rows of `length`.

    Counts the matrix products and causal attention.
    """
    attention = sizes.hidden * 2 * (sizes.queries + sizes.keys)
    products = attention + 3 * sizes.hidden * sizes.intermediate
    scores = 2 * sizes.queries * length  # two products with half of the row
    per_token = 2 * products + scores
    return tokens * sizes.layers * per_token


def head_flops(sizes: Sizes, trained: float) -> float:
    """FLOPs of the head, which sees only the trained tokens; 0 for a value head."""
    return 2 * sizes.vocab * sizes.hidden * trained


def forward_flops(sizes: Sizes, tokens: float, trained: float, length: float) -> float:
    """FLOPs of a forward pass over `tokens`, of which `trained` go through the head."""
    return layer_flops(sizes, tokens, length) + head_flops(sizes, trained)


def update_flops(role: Role, tokens: float, trained: float, length: float) -> float:
    """FLOPs of a forward and a backward pass.

    The backward pass costs two forward passes, or one where only adapters have gradients. With
    checkpointing each layer runs forward a second time, except for its last product, because no
    gradient needs the result of that.
    """
    sizes = role.sizes
    backward = 2 if role.whole else 1
    layers = layer_flops(sizes, tokens, length)
    last_product = 2 * tokens * sizes.layers * sizes.hidden * sizes.intermediate
    again = (layers - last_product) * role.checkpointing
    return (1 + backward) * (layers + head_flops(sizes, trained)) + again

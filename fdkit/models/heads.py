"""Heads: small networks on top of a backbone's feature, used in pretraining and dropped afterwards."""

from torch import nn

from fdkit.models.batch_norm import BatchNorm


def mlp_head(
    in_dim: int, out_dim: int, *, hidden_dim: int, num_layers: int, last_norm: bool = True
) -> nn.Sequential:
    """An MLP of linear layers without bias, batch norm and ReLU after each hidden one; (B, in_dim) to (B, out_dim).

    last_norm: also normalise the output, by a batch norm without scale and shift.
    Batch norms are synchronised across ranks. Source: Chen et al. 2021 (MoCo v3), section 3 and appendix A.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; a head has at least one layer")
    layers: list[nn.Module] = []
    for _ in range(num_layers - 1):
        layers += [nn.Linear(in_dim, hidden_dim, bias=False), BatchNorm(hidden_dim), nn.ReLU(inplace=True)]
        in_dim = hidden_dim
    layers.append(nn.Linear(in_dim, out_dim, bias=False))
    if last_norm:
        layers.append(BatchNorm(out_dim, affine=False))
    return nn.Sequential(*layers)

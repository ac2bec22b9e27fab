"""How a ResNet starts, where a publication differs from timm."""

from fdkit.methods._network import NetworkConfig


def with_full_residuals(network: NetworkConfig) -> NetworkConfig:
    """The network; if it is a timm ResNet, the last batch norm of every residual branch starts from 1, not from 0.

    timm starts each branch at zero (`zero_init_last`), and so each block as the identity. torchvision's ResNets, which
    MoCo v1 and v2 train, and SwAV's own do not. What network.model_args says of it counts first.
    """
    import timm

    name = network.architecture.partition(".")[0]
    is_resnet = timm.is_model(name) and timm.model_entrypoint(name).__module__ == "timm.models.resnet"
    if not is_resnet:
        return network
    return network.model_copy(update={"model_args": {"zero_init_last": False, **network.model_args}})

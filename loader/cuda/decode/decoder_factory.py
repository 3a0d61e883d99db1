"""Makes decoders for one GPU."""

from loader.arithmetic.backend import Backend
from loader.cuda.decode.gpu_decoder import CudaDecoder
from loader.cuda.decode.gpu_layer import fits
from loader.cuda.decode.token_memory import Sizes
from loader.cuda.device.device import Device
from loader.cuda.experts.cpu_share import CpuShare
from loader.cuda.products.packed_products import Products
from loader.decode.path_counters import LeaveDecoder, Reason
from loader.decode.weights import LayerWeights, ModelWeights
from loader.experts.cache import ExpertSource


class CudaDecoderFactory:
    """Makes `CudaDecoder`s.

    share: splits experts between GPU and CPU; None: the GPU computes all. cpu: the CPU's backend
    for its share.
    """

    def __init__(
        self,
        device: Device,
        products: Products,
        share: CpuShare | None = None,
        cpu: Backend | None = None,
    ) -> None:
        self.device = device.torch_device
        self._device = device
        self._products = products
        self._share = share
        self._cpu = cpu

    def make(self, weights: ModelWeights, experts: ExpertSource) -> CudaDecoder:
        """Make a decoder (`DecoderFactory.make`).

        Raises LeaveDecoder if layers differ in size, if a layer's experts have several layouts or
        16 bits, or if the kernels do not support the sizes.
        """
        sizes = _sizes(weights.layers[0], weights)
        for number, layer in enumerate(weights.layers):
            if _sizes(layer, weights) != sizes:
                raise LeaveDecoder(
                    Reason.EXPERTS, f"layer {number} differs from layer 0 in sizes or top_k"
                )
            if layer.layout is None:
                raise LeaveDecoder(
                    Reason.WEIGHTS, f"layer {number} has experts of several packings, or in 16 bits"
                )
        if not fits(sizes):
            raise LeaveDecoder(Reason.WEIGHTS, f"the GPU kernels do not support {sizes}")
        return CudaDecoder(self._device, self._products, sizes, weights, self._share, self._cpu)


def _sizes(layer: LayerWeights, model: ModelWeights) -> Sizes:
    return Sizes(
        dtype=model.dtype,
        hidden=model.hidden,
        heads=layer.attention.q.rows // layer.head_dim,
        kv_heads=layer.attention.k.rows // layer.head_dim,
        head_dim=layer.head_dim,
        experts=layer.experts,
        top_k=layer.top_k,
        scale=layer.scale,
    )

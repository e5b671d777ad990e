"ResNet-9, the network of the CIFAR-10 speed records, among timm's by its name: small images to a good answer in few and large layers."
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

__all__ = ['ResNet9', 'resnet9', 'resnet9_w16', 'resnet9_w32']


class ResNet9(nn.Module):
    """Eight 3×3 convolutions in four stages of `width`, 2, 4 and 8 times `width` channels, the second and last with a residual pair, and one linear layer.

    Images `(n, in_chans, h, w)` of 8 px or more, made for 32; logits `(n, num_classes)`, or the `8·width` features for a `num_classes` of 0.
    The network of https://myrtle.ai/learn/how-to-train-your-resnet, which has a `width` of 64; as there, what the last layer sees is multiplied by 1/8
    (without that, 500 steps of CIFAR-10 came to 71 % instead of 76)."""
    scale, head_dropout = .125, 0.
    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: int = 64, drop_rate: float = 0., **kwargs):
        super().__init__()
        self.in_chans, self.num_features = in_chans, 8*width
        self.stem = ConvBnReLU(in_chans, width)
        self.stage1 = nn.Sequential(ConvBnReLU(width, 2*width, pool=True), Residual(2*width))
        self.stage2 = ConvBnReLU(2*width, 4*width, pool=True)
        self.stage3 = nn.Sequential(ConvBnReLU(4*width, 8*width, pool=True), Residual(8*width))
        self.pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def forward_features(self, x): return self.stage3(self.stage2(self.stage1(self.stem(x))))
    def forward_head(self, x, pre_logits: bool = False):
        x = self.drop(self.pool(x)*self.scale)
        return x if pre_logits else self.fc(x)
    def forward(self, x): return self.forward_head(self.forward_features(x))

    def get_classifier(self): return self.fc
    def reset_classifier(self, num_classes: int, global_pool=None):
        self.num_classes, self.fc = num_classes, nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def group_matcher(self, coarse=False): return dict(stem=r'^stem', blocks=r'^stage(\d+)')


class ConvBnReLU(nn.Sequential):
    "A 3×3 convolution without bias, where asked pooled to half the size, batch norm, ReLU."
    def __init__(self, n_in: int, n_out: int, pool: bool = False):
        super().__init__(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), *([nn.MaxPool2d(2)] if pool else []), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True))


class Residual(nn.Module):
    "What comes in plus two convolutions of it."
    def __init__(self, n: int):
        super().__init__()
        self.pair = nn.Sequential(ConvBnReLU(n, n), ConvBnReLU(n, n))
    def forward(self, x): return x + self.pair(x)


CFG = dict(url='', num_classes=10, input_size=(3, 32, 32), pool_size=None, mean=(.5, .5, .5), std=(.5, .5, .5), first_conv='stem.0', classifier='fc')
default_cfgs = generate_default_cfgs({name: CFG for name in ('resnet9', 'resnet9_w32', 'resnet9_w16')})


@register_model
def resnet9(pretrained=False, **kwargs) -> ResNet9:
    "64 to 512 channels, 6.6 million weights: for a GPU."
    return build_model_with_cfg(ResNet9, 'resnet9', pretrained, width=64, **kwargs)


@register_model
def resnet9_w32(pretrained=False, **kwargs) -> ResNet9:
    "32 to 256 channels, 1.6 million weights."
    return build_model_with_cfg(ResNet9, 'resnet9_w32', pretrained, width=32, **kwargs)


@register_model
def resnet9_w16(pretrained=False, **kwargs) -> ResNet9:
    "16 to 128 channels, 0.4 million weights: for a CPU."
    return build_model_with_cfg(ResNet9, 'resnet9_w16', pretrained, width=16, **kwargs)

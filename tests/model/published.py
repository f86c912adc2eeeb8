"""Names and shapes of published weight files, listed by hand."""

import torch

DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}


def batch_norm(name, channels):
    shapes = {f"{name}.{key}": (channels,) for key in ("weight", "bias")}
    shapes |= {f"{name}.running_{key}": (channels,) for key in ("mean", "var")}
    return shapes | {f"{name}.num_batches_tracked": ()}


def resnet_shapes(name):
    """Return torchvision's names and shapes of a ResNet without its classifier."""
    bottleneck = name in ("resnet50", "resnet101")
    shapes = {"conv1.weight": (64, 3, 7, 7), **batch_norm("bn1", 64)}
    inputs = 64
    for stage, units in enumerate(DEPTHS[name]):
        width = 64 * 2**stage
        outputs = width * 4 if bottleneck else width
        for unit in range(units):
            block = f"layer{stage + 1}.{unit}"
            kernels = [(width, inputs, 3), (width, width, 3)]
            if bottleneck:
                kernels = [(width, inputs, 1), (width, width, 3), (outputs, width, 1)]
            for number, (out, into, kernel) in enumerate(kernels, start=1):
                shapes[f"{block}.conv{number}.weight"] = (out, into, kernel, kernel)
                shapes |= batch_norm(f"{block}.bn{number}", out)
            if inputs != outputs:
                shapes[f"{block}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                shapes |= batch_norm(f"{block}.downsample.1", outputs)
            inputs = outputs
    return shapes


def channels(name):
    """Return the number of channels before ASPP."""
    return 2048 if name in ("resnet50", "resnet101") else 512


def aspp_shapes(prefix, inputs):
    shapes = {}
    for index, kernel in enumerate((1, 3, 3, 3)):
        shapes[f"{prefix}.convs.{index}.0.weight"] = (256, inputs, kernel, kernel)
        shapes |= batch_norm(f"{prefix}.convs.{index}.1", 256)
    shapes[f"{prefix}.convs.4.1.weight"] = (256, inputs, 1, 1)
    shapes |= batch_norm(f"{prefix}.convs.4.2", 256)
    shapes[f"{prefix}.project.0.weight"] = (256, 1280, 1, 1)
    return shapes | batch_norm(f"{prefix}.project.1", 256)


def v3_shapes(name, classes, head):
    """Return a DeepLabv3 with its head under `head`: 'classifier', or one level deeper (VainF)."""
    shapes = {f"backbone.{key}": shape for key, shape in resnet_shapes(name).items()}
    shapes |= aspp_shapes(f"{head}.0", channels(name))
    shapes[f"{head}.1.weight"] = (256, 256, 3, 3)
    shapes |= batch_norm(f"{head}.2", 256)
    return shapes | {f"{head}.4.weight": (classes, 256, 1, 1), f"{head}.4.bias": (classes,)}


def torchvision_shapes(name, classes=21):
    """Return torchvision's DeepLabv3 with its auxiliary head."""
    shapes, into = v3_shapes(name, classes, "classifier"), channels(name) // 2
    shapes["aux_classifier.0.weight"] = (into // 4, into, 3, 3)
    shapes |= batch_norm("aux_classifier.1", into // 4)
    shapes["aux_classifier.4.weight"] = (classes, into // 4, 1, 1)
    return shapes | {"aux_classifier.4.bias": (classes,)}


def vainf_shapes(name, classes=21):
    """Return VainF's DeepLabv3."""
    return v3_shapes(name, classes, "classifier.classifier")


def vainf_plus_shapes(name, classes=21):
    """Return VainF's DeepLabv3+."""
    shapes = {f"backbone.{key}": shape for key, shape in resnet_shapes(name).items()}
    shapes["classifier.project.0.weight"] = (48, channels(name) // 8, 1, 1)
    shapes |= batch_norm("classifier.project.1", 48)
    shapes |= aspp_shapes("classifier.aspp", channels(name))
    shapes["classifier.classifier.0.weight"] = (256, 304, 3, 3)
    shapes |= batch_norm("classifier.classifier.1", 256)
    shapes["classifier.classifier.3.weight"] = (classes, 256, 1, 1)
    return shapes | {"classifier.classifier.3.bias": (classes,)}


def constants(shapes):
    """Return a constant tensor of each shape, all different, which takes almost no memory."""
    return {
        key: torch.tensor(number if key.endswith("tracked") else number / 7.0).expand(shape)
        for number, (key, shape) in enumerate(shapes.items(), start=1)
    }

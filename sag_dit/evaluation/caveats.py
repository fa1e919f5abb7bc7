"""What a reader of the numbers should know: departures from the protocol, degenerate inputs."""

from __future__ import annotations

from collections.abc import Mapping

from sag_dit.evaluation.reference import Reference


def caveats(
    reference: Reference,
    count: int,
    values: Mapping[str, float],
    constant: Mapping[str, bool],
    split_size: int,
) -> list[str]:
    """Return a sentence for each thing that makes ``values`` of ``count`` images less comparable.

    ``constant`` says for each Fréchet distance whether all images have the same features.
    """
    # Published numbers are of a certain count, on which FID and recall depend.
    found = []
    expected = reference.protocol.get("sample_count")
    if expected is not None and count != expected:
        found.append(
            f"{count:,} images, but numbers published against {reference.name} are of "
            f"{expected:,}: FID is larger and recall differs with fewer images"
        )
    # A covariance of no more images than dimensions is singular, and so is one of equal features.
    for name, statistics in (("fid", reference.pool), ("sfid", reference.spatial)):
        if name not in values or statistics is None:
            continue
        width = statistics.mean.numel()
        for what, number in (("images", count), ("reference images", statistics.number)):
            if number is not None and number <= width:
                found.append(
                    f"{name}: {number:,} {what} for {width:,} dimensions, so the covariance is "
                    f"singular and the distance biased; take more than {width:,}"
                )
        if constant.get(name):
            found.append(f"{name}: all images have the same features, so nothing varies")
    # The Inception Score of images that all look alike, or with a short last split.
    if values.get("is", 2.0) < 1 + 1e-6:
        found.append("is: the score is 1, every image is given the same classes")
    short = count % split_size
    if "is" in values and count > split_size and short:
        found.append(
            f"is: the last split has {short:,} images and counts as much as those of {split_size:,}"
        )
    # A reference with unequal classes.
    labels = reference.protocol.get("labels")
    if labels and labels["most"] > 1.5 * labels["fewest"]:
        found.append(
            f"{reference.name}: its classes have {labels['fewest']:,} to {labels['most']:,} "
            f"images, so a set with equal classes is a different distribution"
        )
    return found

"""What the router knows of a function: the information between a sample's label and a token's expert.

    I(Y; E) = sum_(y, e) p(y, e) log2 (p(y, e) / (p(y) p(e)))   bits

with p(y, e) the share of the choices of expert e, in samples labelled y, among all. It needs no neurons. As
tokens of one sample are alike, it is above 0 by chance; shuffled labels tell how far.

Shapes: W samples, R labellings, E experts.
"""

import numpy as np
import numpy.typing as npt
from scipy.special import xlogy

from megamoe.analyze.predictivity import Floats, Labels


def mutual_information(choices_WE: npt.NDArray[np.integer], labels_RW: Labels) -> Floats:
    """I in bits under every labelling, [R]; 0 where no choice was made."""
    total_E = choices_WE.sum(0)
    positive_RE = labels_RW.astype(np.int64) @ choices_WE
    joint_R2E = np.stack([positive_RE, total_E - positive_RE], axis=1) / max(1, total_E.sum())
    alone_R2E = joint_R2E.sum(2, keepdims=True) * joint_R2E.sum(1, keepdims=True)
    return (xlogy(joint_R2E, joint_R2E) - xlogy(joint_R2E, alone_R2E)).sum((1, 2)) / np.log(2)

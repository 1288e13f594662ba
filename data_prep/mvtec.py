"""MVTec AD: 15 objects and textures, https://www.mvtec.com/company/research/datasets/mvtec-ad

    ROOT/bottle/{train/good,test/good,test/TYPE}/000.png, ROOT/bottle/ground_truth/TYPE/000_mask.png

Counts: Bergmann et al., IJCV 2021, Table 1 (3,629 for training, 1,725 for tests of which 1,258 are bad).
"""
from . import folder

records = folder.records  # the layout that `folder` is named after

PUBLISHED = {"images": 5354, "train good": 3629, "test good": 467, "test bad": 1258, "categories": 15}

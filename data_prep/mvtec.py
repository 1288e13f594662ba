"""MVTec AD: 15 objects and textures, https://www.mvtec.com/company/research/datasets/mvtec-ad

    ROOT/bottle/{train/good,test/good,test/TYPE}/000.png, ROOT/bottle/ground_truth/TYPE/000_mask.png

Counts: Bergmann et al., IJCV 2021, Table 1 (3,629 for training, 1,725 for tests of which 1,258 are
bad).
"""
from . import folder

records = folder.records  # the layout that `folder` is named after

PUBLISHED = {"images": 5354, "train good": 3629, "test good": 467, "test bad": 1258, "masks": 1258,
             "categories": 15} | {
    f"category {name}": count for name, count in dict(
        bottle=292, cable=374, capsule=351, carpet=397, grid=342, hazelnut=501, leather=369,
        metal_nut=335, pill=434, screw=480, tile=347, toothbrush=102, transistor=313, wood=326,
        zipper=391).items()}

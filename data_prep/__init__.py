"""From a published data set, as downloaded, to a manifest: one JSON record a line, which points at
the original files.

    python -m data_prep mvtec --root DOWNLOADED_DIR --out DIR        (NAME --help shows the folders)
    python train.py --data DIR ...        python evaluate.py --data DIR ...

    image      path, relative to the manifest; photographs are never copied
    mask       path of a label map (8-bit PNG, one value a label, 0 = not marked), or
               {value: COCO RLE}; absent: nothing is marked
    labels     {value: name}; {"*": name} says that every value but 0 is `name`, so that masks of 0
               and 255 are used where they lie
    split      "train" or "test"
    group      what shows the same physical item: prompt and test never share one
    box        [x0, y0, x1, y1]: only this part of image and mask counts
    category   the object, where a data set has several
    anomalous  true where an image is known to be bad but nobody marked where
"""

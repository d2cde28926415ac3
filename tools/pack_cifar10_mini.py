"""Pack the 2,000 CIFAR-10 test images that ship with the package, as one mosaic.

    DFKD_DATA=... python tools/pack_cifar10_mini.py

The first 200 of each class, as JPEG at quality 99 without colour subsampling: 2.8 MB, where
lossless WebP takes 3.3 MB. Tiles of 32 pixels fall on the codec's 8-pixel blocks, so that
no image bleeds into its neighbour.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dfkd_nb.toolbox.datasets import load_data

PER_CLASS, COLUMNS = 200, 50
FOLDER = Path(__file__).parents[1] / 'dfkd_nb' / 'assets'


def main() -> None:
    test = load_data('cifar10', 'test')
    chosen = (
        torch.cat([(test.labels == k).nonzero()[:PER_CLASS, 0] for k in range(10)])
        .sort()
        .values
    )
    tiles = test.images[chosen].unflatten(0, (-1, COLUMNS))  # rows, columns, 3, 32, 32
    mosaic = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(mosaic).save(buffer, 'JPEG', quality=99, subsampling=0, optimize=True)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / 'cifar10-mini.jpg').write_bytes(buffer.getvalue())
    (FOLDER / 'cifar10-mini.txt').write_text(
        ''.join(map(str, test.labels[chosen].tolist())) + '\n'
    )
    error = np.array(Image.open(buffer)).astype(int) - mosaic
    print(
        f'{len(buffer.getvalue()):,} bytes, root mean square error'
        f' {(error**2).mean() ** 0.5:.2f} of 255, at most {abs(error).max()}'
    )


if __name__ == '__main__':
    main()

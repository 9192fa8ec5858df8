"""NVIDIA DALI's CPU pipeline on a folder of class folders; prints images/s.

A script of its own, which imports nothing of imgcls: DALI may live in another environment than this package.
"""

from __future__ import annotations

import argparse
import time


def main() -> None:
    from nvidia.dali import fn, pipeline_def, types  # not installed with imgcls

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    for name in ("batch", "threads", "size", "warm-up", "batches"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()

    @pipeline_def(batch_size=args.batch, num_threads=args.threads, device_id=None, seed=1)
    def pipeline():  # type: ignore[no-untyped-def]
        files, labels = fn.readers.file(file_root=args.folder, random_shuffle=True)
        images = fn.decoders.image_random_crop(
            files, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], num_attempts=10
        )
        images = fn.resize(images, size=[args.size, args.size], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    made = pipeline()
    made.build()
    for _ in range(args.warm_up):
        made.run()
    start = time.perf_counter()
    for _ in range(args.batches):
        made.run()
    print(args.batch * args.batches / (time.perf_counter() - start))


if __name__ == "__main__":
    main()

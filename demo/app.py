"""Start the demo: `zoo demo`, `python demo/app.py`, or as a Space on the Hugging Face hub, with the same options."""

import os
import sys
import threading

try:  # on a ZeroGPU Space this has to come before torch
    import spaces  # noqa: F401
except ImportError:
    pass

from zoo.demo.settings import Settings

FIRST = "first model"  # name of its thread


def serve(settings: Settings) -> None:
    """Run the demo until it is stopped.

    Raises:
        ZooError: a model that is named can't be had, or the address can't be taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
    from zoo.demo.uploads import Uploads

    try:
        with Uploads() as uploads:
            os.environ["GRADIO_TEMP_DIR"] = str(uploads.folder)
            from zoo.demo.run import run

            run(settings, uploads)
    except KeyboardInterrupt:
        if any(thread.name == FIRST and thread.is_alive() for thread in threading.enumerate()):
            print("zoo: stopped.", file=sys.stderr, flush=True)
            os._exit(130)  # in the middle of its work torch aborts an interpreter that ends
        raise


if __name__ == "__main__":
    from zoo.cli import main

    sys.exit(main(["demo", *sys.argv[1:]]))

"""The uploader: a Celery application with one worker on each host that trains, ``celery -A tasks worker``.

It moves what trainers have staged to the store, decides checkpoints, and finds by itself what no message told it of. Importing this
package makes no connection and no folder, and reads no setting.
"""

from tasks.application import app

__all__ = ["app"]

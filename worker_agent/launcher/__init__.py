"""The launcher, ``dtr run``: starts trainers, beats for them, reports how they ended, starts them again, ends with their status.

Who does what, from the decisions down to the shells that act:

=================  ===========================================================================================================
``policy``         pure: what follows when a trainer ends, a signal comes, time passes
``stall``          pure: when a living trainer counts as stalled
``plan``           pure: what is launched, the environment of each trainer
``loop``           the one thread that waits for events, asks the policy and acts
``children``       a trainer as a process with its group
``desk``, ``care`` registrations over a Unix socket per seat, and who is looked after because of them
``ward``           beats and departures, in threads of their own
``relay``          a small process that labels the lines of several trainers
``ground``         coordinator and uploader: what is missing is started for the time of the run
``claim``          this launcher's index and folder among those of its job on this host
=================  ===========================================================================================================
"""

from worker_agent.launcher.main import Given, launch
from worker_agent.launcher.plan import Launch

__all__ = ["Given", "Launch", "launch"]

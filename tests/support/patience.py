"""How long tests wait for other processes: limits that end a hang, and never judge how fast a machine is.

No other file here has a limit of its own. A test waits for an event, such as a rank that answers or a process that
ends; one of these passes only where the event will not come.
"""

from __future__ import annotations

PATIENCE = 900.0  # seconds in which a job, a program or a collective call ends, or is said to hang
GRACE = 120.0  # seconds more for the other ranks of a job, when one has failed, to say what they know
MOMENT = 1.0  # seconds until something fails whose lateness is the test's subject, such as a rank that never comes

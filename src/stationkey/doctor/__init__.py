"""``stationkey doctor``: looks at everything that a station needs, changes nothing, and says what to do.

A check is a row: its id, what it looks at, who judges, what it depends on. The rows of an area stand at the end of its
module. Looking takes files, sockets, devices and programs, with a deadline for each; functions called ``_judge_…`` take
what was seen and nothing else.
"""

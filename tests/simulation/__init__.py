"""A station in a deterministic simulation: the real parts, a simulated world, and every choice from one seed.

Real are the service (requests, statuses, expiry, pool), the ledger with SQLite as it is, the files under ``active/``,
the gateway and the ``keys`` commands. Simulated are:

- the machine (`machine`, ``machine.c``): a library that sits between the process and its C library. The clocks and
  random numbers of the whole process come from it, and it knows of each file what a loss of power leaves of it, sector
  by sector. So nothing in the program has to know that it is simulated;
- threads (`scheduler`): an event loop in virtual time, and workers that run or stop when they are told to;
- the broker (`broker`), the TPM (`keystores`), Josev and its certificate directory (`josev`).

`station` puts the real parts together, `world` takes the steps, `checks` has what must be true after each of them,
`mutants` are faults that are planted to see that it finds them, `runner` runs and shrinks.

To run::

    make simulate                 until Ctrl-C; every ten seconds it says how many seeds and steps there were
    make simulate HOURS=8         for as long
    make simulate SEED=1234       one seed with all that happens in it; shrunk if it breaks a truth
    make simulate SEED=1234 MUTANT=no-fsync

A failure says its seed and step. The same seed is the same run on the same code; on other code it is another run, so a
fault that was found gets a test of its own where it was.

To extend it: what may go wrong is a row of `world.FAULTS` and a method of that name; what Josev does is one of
`world._LIFE`; a truth is a `Violation` raised in `checks`; a mutant is a row of `mutants.MUTANTS`, and of the table in
``docs/reliability.md``. A choice is made by the random numbers that the method is given, never by others: they are
drawn from the seed and the number of the step, so that a step can be left out and the others stay the same.
"""

"""`python -m elsa_tune`: the command line, where its script is not on the PATH."""

from elsa_tune.shell.entry import main

if __name__ == "__main__":
    main()

"""What runs beside a program under test: these modules alone, in a bare interpreter, with the standard library only.

launcher.py forks, for every program, a chain of processes:

    launcher            waits for jobs on its standard input; trusted, outside
      `- gate           enters new namespaces, and waits
           `- judge     init of the new PID namespace; makes the root file system, gives up every privilege; supervises
                        the program and holds the tests; its memory cannot be read by the program
                `- program   resource limits, system call filter, then the code under test

The parent sends their source through the launcher's standard input (see worker.py), so that they also run where only
a Python is installed: in a container.
"""

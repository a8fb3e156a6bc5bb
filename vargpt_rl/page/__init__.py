"""The page of a run: one self-contained HTML file that is a pure function of the run directory.

``python -m vargpt_rl.page RUN [RUN]`` writes it. It needs neither torch nor the run's machine, and works on runs that
are under way, stopped, finished, or hardly begun.
"""

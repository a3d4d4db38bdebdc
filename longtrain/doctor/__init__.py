"""What is wrong with a machine, before training finds out: questions in a process of their own, and a judgement of the answers."""

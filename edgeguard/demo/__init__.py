"""The whole loop on one machine, with real parts: attack, convert, detect, report, decide, repair, roll out."""

"""Model files in, one verified, guarded, quantised TFLite file out.

The order of work, one module each: ``sources`` reads a model and makes it int8, ``taps`` plans where the guard listens,
``guard`` compiles the guard into the graph, ``verify`` proves that nothing else changed, ``pipeline`` does all of it.
``flatbuffer`` holds what they know of the file format.
"""

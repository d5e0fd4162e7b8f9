// Metal needs no prelude: the kernels are written in its language. This file exists so that both dialects have one.

// All that knows Python, but for direct.cpp. Pointers arrive as integers, so that torch is neither included nor linked;
// the argument lists are spelled by s3t_ext/lora/kernels/native.py, which is their only caller.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string>

#include "direct.h"
#include "philox.h"
#include "s3t.h"

namespace py = pybind11;

namespace {

template <typename T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

s3t_type type_of(int code) {
    return static_cast<s3t_type>(code);
}

void check(int32_t status) {
    if (status == S3T_OK) return;
    if (status == S3T_BAD_CPU) {
        const char* wanted = std::getenv("S3T_CPU");
        throw py::value_error("S3T_CPU must name an instruction set of this processor (" + std::string(s3t_cpus()) +
                              ") or be unset; got '" + (wanted == nullptr ? "" : wanted) + "'");
    }
    if (status == S3T_NO_CUDA) {
        PyErr_SetString(PyExc_NotImplementedError,
                        "s3t_ext was built without CUDA; install it again with nvcc on PATH");
        throw py::error_already_set();
    }
    throw std::runtime_error(std::string("CUDA: ") + s3t_cuda_error(status));
}

// Each function takes the parts of the structs of s3t.h in the order in which native.py lists them; device < 0 is the
// CPU.
using P = uintptr_t;
using I = int64_t;
using Tuple = const py::tuple&;

// Reads the numbers of a tuple in turn, at a fifth of the cost of pybind11's casts: a call passes about forty. What is
// no number, or missing, leaves Python's error set, which `run` finds.
class Numbers {
  public:
    explicit Numbers(Tuple tuple) : tuple_(tuple.ptr()) {}

    I number() { return PyLong_AsLongLong(PyTuple_GetItem(tuple_, next_++)); }
    s3t_type type() { return static_cast<s3t_type>(number()); }
    template <typename T = void>
    T* pointer() {
        return reinterpret_cast<T*>(number());
    }

  private:
    PyObject* tuple_;
    Py_ssize_t next_ = 0;
};

// Braces: their parts are evaluated in order.
s3t_matrix matrix_of(Tuple t) {
    Numbers n(t);
    return {n.pointer(), n.number(), n.type()};
}

s3t_pools pools_of(Tuple t) {
    Numbers n(t);
    return {n.pointer(), n.pointer(), n.number(), n.number(), n.number(), n.number(), n.type(), n.type()};
}

s3t_table table_of(Tuple t) {
    Numbers n(t);
    return {n.pointer<const int32_t>(), n.number(), n.number(), n.pointer<const int32_t>(), n.number(), n.number()};
}

s3t_dropout dropout_of(Tuple t) {
    Numbers n(t);
    return {n.pointer<const int64_t>(), n.pointer<const int64_t>(), static_cast<uint32_t>(n.number()), n.number()};
}

struct Where {
    int threads, device;
    void* stream;
};

Where where_of(Tuple t) {
    Numbers n(t);
    return {static_cast<int>(n.number()), static_cast<int>(n.number()), n.pointer()};
}

void raise_if_set() {
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
}

// Runs without the interpreter's lock and raises what the status says.
template <typename OnCpu, typename OnCuda>
void run(const Where& where, OnCpu on_cpu, OnCuda on_cuda) {
    raise_if_set();
    int32_t status;
    {
        py::gil_scoped_release unlocked;
        status = where.device < 0 ? on_cpu(where.threads) : on_cuda(where.device, where.stream);
    }
    check(status);
}

bool check_values(Tuple table, I rows, I adapters) {
    const s3t_table numbers = table_of(table);
    raise_if_set();
    return s3t_check_values(&numbers, rows, adapters);
}

s3t_shrink_args shrink_args(I rows, Tuple u, P s, Tuple pools, Tuple table, P scales, float scale, Tuple dropout) {
    return {rows,
            matrix_of(u),
            pointer(s),
            pools_of(pools),
            table_of(table),
            dropout_of(dropout),
            pointer<const float>(scales),
            scale};
}

s3t_linear_args linear_args(I rows, I inner, I outer, Tuple x, Tuple y, P weight, bool packed, bool transposed, P bias,
                            P s, Tuple pools, Tuple table, Tuple dropout) {
    return {rows,       inner,         outer,      matrix_of(x),    matrix_of(y),    pointer(weight),    packed,
            transposed, pointer(bias), pointer(s), pools_of(pools), table_of(table), dropout_of(dropout)};
}

void shrink(I rows, Tuple u, P s, Tuple pools, Tuple table, P scales, float scale, Tuple dropout, Tuple where) {
    const s3t_shrink_args args = shrink_args(rows, u, s, pools, table, scales, scale, dropout);
    run(
        where_of(where), [&](int threads) { return s3t_shrink(&args, threads); },
        [&](int device, void* stream) { return s3t_shrink_cuda(&args, device, stream); });
}

void expand(I rows, Tuple y, P s, Tuple pools, Tuple table, Tuple dropout, Tuple where) {
    const s3t_expand_args args{rows, matrix_of(y), pointer(s), pools_of(pools), table_of(table), dropout_of(dropout)};
    run(
        where_of(where), [&](int threads) { return s3t_expand(&args, threads); },
        [&](int device, void* stream) { return s3t_expand_cuda(&args, device, stream); });
}

void linear(I rows, I inner, I outer, Tuple x, Tuple y, P weight, bool packed, bool transposed, P bias, P s,
            Tuple pools, Tuple table, Tuple dropout, Tuple where) {
    const s3t_linear_args args =
        linear_args(rows, inner, outer, x, y, weight, packed, transposed, bias, s, pools, table, dropout);
    run(
        where_of(where), [&](int threads) { return s3t_linear(&args, threads); },
        [&](int device, void* stream) { return s3t_linear_cuda(&args, device, stream); });
}

void layer(I rows, I inner, I outer, Tuple x, Tuple y, P weight, bool packed, P bias, P s, Tuple a, Tuple b,
           Tuple table, P scales, float scale, Tuple dropout, Tuple where) {
    const s3t_shrink_args down = shrink_args(rows, x, s, a, table, scales, scale, dropout);
    s3t_linear_args up = linear_args(rows, inner, outer, x, y, weight, packed, false, bias, s, b, table, dropout);
    up.dropout.seeds = nullptr;  // forward drops elements of x only
    run(
        where_of(where), [&](int threads) { return s3t_layer(&down, &up, threads); },
        [&](int device, void* stream) { return s3t_layer_cuda(&down, &up, device, stream); });
}

s3t_outer_args outer_args(I rows, I dim, I rank, I first, I count, Tuple u, P s, Tuple table, Tuple dropout, P dw,
                          int dw_type) {
    return {rows,
            dim,
            rank,
            first,
            count,
            matrix_of(u),
            pointer(s),
            table_of(table),
            dropout_of(dropout),
            pointer(dw),
            type_of(dw_type)};
}

void outer(I rows, I dim, I rank, I first, I count, Tuple u, P s, Tuple table, Tuple dropout, P dw, int dw_type,
           P workspace, Tuple where) {
    const s3t_outer_args args = outer_args(rows, dim, rank, first, count, u, s, table, dropout, dw, dw_type);
    run(
        where_of(where), [&](int threads) { return s3t_outer(&args, threads); },
        [&](int device, void* stream) { return s3t_outer_cuda(&args, pointer(workspace), device, stream); });
}

I outer_workspace(I rows, I dim, I rank, I first, I count, Tuple u, P s, Tuple table, Tuple dropout, P dw,
                  int dw_type) {
    const s3t_outer_args args = outer_args(rows, dim, rank, first, count, u, s, table, dropout, dw, dw_type);
    raise_if_set();
    return s3t_outer_workspace(&args);
}

void pack(I out, I in, P weight, I row, I column, P panels, int type, int threads) {
    const s3t_pack_args args{out, in, pointer(weight), row, column, pointer(panels), type_of(type)};
    int32_t status;
    {
        py::gil_scoped_release unlocked;
        status = s3t_pack(&args, threads);
    }
    check(status);
}

s3t_heads heads_of(Tuple t) {
    Numbers n(t);
    return {n.pointer(), n.number(), n.number(), n.number()};
}

void attend(Tuple sizes, int type, Tuple q, Tuple k, Tuple v, Tuple y, Tuple mask, P stats, float scale, Tuple dq,
            Tuple dk, Tuple dv, Tuple ragged, bool backward, int threads) {
    Numbers n(sizes), m(mask), r(ragged);
    const s3t_attention_args args{n.number(),
                                  n.number(),
                                  n.number(),
                                  n.number(),
                                  n.number(),
                                  n.number(),
                                  type_of(type),
                                  heads_of(q),
                                  heads_of(k),
                                  heads_of(v),
                                  heads_of(y),
                                  m.pointer<const float>(),
                                  m.number(),
                                  m.number(),
                                  pointer<float>(stats),
                                  scale,
                                  heads_of(dq),
                                  heads_of(dk),
                                  heads_of(dv),
                                  r.pointer<const int64_t>(),
                                  r.number() != 0};
    raise_if_set();
    int32_t status;
    {
        py::gil_scoped_release unlocked;
        status = s3t_attention(&args, backward, threads);
    }
    check(status);
}

// The words of the mask, for a test of the generator against published numbers.
py::tuple words(uint64_t seed, uint64_t row, uint32_t quad, uint32_t slot) {
    const s3t::Words w = s3t::philox(seed, row, quad, slot);
    return py::make_tuple(w.at[0], w.at[1], w.at[2], w.at[3]);
}

py::dict build_info() {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["cuda"] = S3T_CUDA_VERSION;
    info["cuda_archs"] = py::str(S3T_CUDA_ARCHS).attr("split")();
    const char* isa = s3t_cpu();
    info["isa"] = isa == nullptr ? "" : isa;
    info["isas"] = py::str(s3t_cpus()).attr("split")();
    info["threads"] = s3t_threads();
    return info;
}

}  // namespace

#if !defined(S3T_WITH_CUDA)
int32_t s3t_shrink_cuda(const s3t_shrink_args*, int32_t, void*) {
    return S3T_NO_CUDA;
}
int32_t s3t_expand_cuda(const s3t_expand_args*, int32_t, void*) {
    return S3T_NO_CUDA;
}
int32_t s3t_linear_cuda(const s3t_linear_args*, int32_t, void*) {
    return S3T_NO_CUDA;
}
int32_t s3t_layer_cuda(const s3t_shrink_args*, const s3t_linear_args*, int32_t, void*) {
    return S3T_NO_CUDA;
}
int64_t s3t_outer_workspace(const s3t_outer_args*) {
    return 0;
}
int32_t s3t_outer_cuda(const s3t_outer_args*, void*, int32_t, void*) {
    return S3T_NO_CUDA;
}
const char* s3t_cuda_error(int32_t) {
    return "";
}
#endif

PYBIND11_MODULE(_native, module, py::mod_gil_not_used()) {
    module.doc() = "Native kernels of s3t_ext; call them through s3t_ext.lora.kernels.native.";
    module.def("check_values", check_values);
    module.def("shrink", shrink);
    module.def("expand", expand);
    module.def("linear", linear);
    module.def("layer", layer);
    module.def("outer", outer);
    module.def("outer_workspace", outer_workspace);
    module.def("words", words);
    module.def("pack", pack);
    module.def("attend", attend);
    module.def("build_info", build_info);
    add_direct(module);
}

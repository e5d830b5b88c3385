// The only file that knows Python. Pointers arrive as integers, so that torch is neither included nor linked; the
// argument lists are spelled by s3t_ext/lora/kernels/native.py, which is their only caller.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string>

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

// Each function takes the parts of the structs of s3t.h in the order in which native.py lists them.
using P = uintptr_t;
using I = int64_t;

s3t_matrix matrix(P data, I stride, int type) {
    return {pointer(data), stride, type_of(type)};
}

s3t_pools pools_of(const py::tuple& t) {
    return {
        pointer(t[0].cast<P>()), pointer(t[1].cast<P>()),   t[2].cast<I>(),           t[3].cast<I>(), t[4].cast<I>(),
        t[5].cast<I>(),          type_of(t[6].cast<int>()), type_of(t[7].cast<int>())};
}

s3t_table table_of(const py::tuple& t) {
    return {pointer<const int32_t>(t[0].cast<P>()), t[1].cast<I>(), t[2].cast<I>(),
            pointer<const int32_t>(t[3].cast<P>()), t[4].cast<I>(), t[5].cast<I>()};
}

// device < 0 is the CPU.
void shrink(I rows, P u, I stride, int type, P s, const py::tuple& pools, const py::tuple& table, P scales, float scale,
            int threads, int device, P stream) {
    const s3t_shrink_args args{
        rows, matrix(u, stride, type), pointer(s), pools_of(pools), table_of(table), pointer<const float>(scales),
        scale};
    int32_t status;
    {
        py::gil_scoped_release unlocked;
        status = device < 0 ? s3t_shrink(&args, threads) : s3t_shrink_cuda(&args, device, pointer(stream));
    }
    check(status);
}

void expand(I rows, P y, I stride, int type, P s, const py::tuple& pools, const py::tuple& table, int threads) {
    const s3t_expand_args args{rows, matrix(y, stride, type), pointer(s), pools_of(pools), table_of(table)};
    int32_t status;
    {
        py::gil_scoped_release unlocked;
        status = s3t_expand(&args, threads);
    }
    check(status);
}

void linear(I rows, I inner, I outer, P x, I stride, int type, P y, P weight, bool packed, bool transposed, P bias, P s,
            const py::tuple& pools, const py::tuple& table, int threads) {
    const s3t_linear_args args{
        rows,       inner,         outer,      matrix(x, stride, type), matrix(y, outer, type), pointer(weight), packed,
        transposed, pointer(bias), pointer(s), pools_of(pools),         table_of(table)};
    int32_t status;
    {
        py::gil_scoped_release unlocked;
        status = s3t_linear(&args, threads);
    }
    check(status);
}

void outer(I rows, I dim, I rank, I first, I count, P u, I stride, int type, P s, const py::tuple& table, P dw,
           int dw_type, int threads) {
    const s3t_outer_args args{rows,        dim,
                              rank,        first,
                              count,       matrix(u, stride, type),
                              pointer(s),  table_of(table),
                              pointer(dw), type_of(dw_type)};
    int32_t status;
    {
        py::gil_scoped_release unlocked;
        status = s3t_outer(&args, threads);
    }
    check(status);
}

void pack(I out, I in, P weight, P panels, int type, int threads) {
    const s3t_pack_args args{out, in, pointer(weight), pointer(panels), type_of(type)};
    int32_t status;
    {
        py::gil_scoped_release unlocked;
        status = s3t_pack(&args, threads);
    }
    check(status);
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
const char* s3t_cuda_error(int32_t) {
    return "";
}
#endif

PYBIND11_MODULE(_native, module, py::mod_gil_not_used()) {
    module.doc() = "Native kernels of s3t_ext; call them through s3t_ext.lora.kernels.native.";
    module.def("shrink", shrink);
    module.def("expand", expand);
    module.def("linear", linear);
    module.def("outer", outer);
    module.def("pack", pack);
    module.def("build_info", build_info);
}

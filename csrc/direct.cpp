// The ordinary call of a layer: on the CPU, without gradient, watched by nothing in torch. One step leads from Python's
// tensors to the kernel, because the kernel evicts the interpreter's data: each line of Python is paid in cache misses.
// Tensors are read by the C functions that torch publishes for DLPack, so that torch is neither included nor linked.
// What is not certainly right is declined, by returning None: the way through s3t_ext.lora.autograd then does it, or
// says what is wrong.
#include "direct.h"

#include <algorithm>
#include <array>
#include <functional>
#include <initializer_list>
#include <memory>
#include <new>
#include <numeric>

#include "s3t.h"

namespace py = pybind11;

namespace {

// DLPack 1: DLTensor, and DLPackExchangeAPI up to the function that is called here.
struct View {
    void* data;
    int32_t device, device_number, dims;
    uint8_t code, bits;
    uint16_t lanes;
    const int64_t *shape, *strides;  // the tensor's own
    uint64_t byte_offset;
};
struct Exchange {
    uint32_t major, minor;
    void *previous, *allocate, *managed_from, *managed_to;
    int (*view_of)(void* tensor, View* view);
};
constexpr int32_t kCpu = 1, kMostDims = 8;  // kMostDims: of x, as much as anybody has
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

// What `attach` was given, held for good; without `view_of` every call is declined.
struct Torch {
    int (*view_of)(void*, View*);
    PyObject *tensor, *parameter;                  // types
    PyObject* watchers;                            // functions (): one is true where somebody watches
    PyObject *grad_enabled, *threads;              // functions ()
    PyObject *is_neg, *new_empty, *requires_grad;  // methods; the name of an attribute
} torch;

enum Type : int { kF32 = S3T_F32, kF16 = S3T_F16, kBf16 = S3T_BF16, kInt32, kOther };

Type type_of(const View& v) {
    if (v.lanes != 1) return kOther;
    if (v.bits == 32) return v.code == kFloat ? kF32 : v.code == kInt ? kInt32 : kOther;
    if (v.bits == 16) return v.code == kFloat ? kF16 : v.code == kBfloat ? kBf16 : kOther;
    return kOther;
}

bool empty(const View& v) {
    return std::find(v.shape, v.shape + v.dims, 0) != v.shape + v.dims;
}

bool contiguous(const View& v) {
    int64_t size = 1;
    for (int d = v.dims - 1; d >= 0; size *= v.shape[d--]) {
        if (v.shape[d] != 1 && v.strides[d] != size) return empty(v);
    }
    return true;
}

bool is(const View& v, Type type, std::initializer_list<int64_t> shape) {
    return type_of(v) == type && v.dims == static_cast<int>(shape.size()) &&
           std::equal(shape.begin(), shape.end(), v.shape) && contiguous(v);
}

// Tells whether an answer is anything but False or None, and drops it; so is an error, which `direct` clears.
bool holds(PyObject* answer) {
    const bool yes = answer != Py_False && answer != Py_None && (answer == nullptr || PyObject_IsTrue(answer) != 0);
    Py_XDECREF(answer);
    return yes;
}

bool view_of(PyObject* tensor, View& view) {
    if (torch.view_of(tensor, &view) != 0) return false;
    if (view.data != nullptr) view.data = static_cast<char*>(view.data) + view.byte_offset;
    return true;
}

// Tells whether so many numbers could be in memory at all: no product of sizes below overflows then.
bool fits(std::initializer_list<int64_t> sizes) {
    double count = 1;
    for (const int64_t size : sizes) count *= static_cast<double>(size);
    return count < 0x1p48;
}

// Reads a tensor of torch's own types, on the CPU, whose memory holds its numbers: not their negatives, not nothing.
bool read(PyObject* tensor, View& view) {
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    if (type != torch.tensor && type != torch.parameter) return false;
    if (!view_of(tensor, view) || view.device != kCpu || (view.data == nullptr && !empty(view))) return false;
    return !holds(PyObject_Vectorcall(torch.is_neg, &tensor, 1, nullptr));
}

bool watched() {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch.watchers); ++i) {
        if (holds(PyObject_CallNoArgs(PyTuple_GET_ITEM(torch.watchers, i)))) return true;
    }
    return false;
}

enum Argument { kX, kWeight, kTurned, kBias, kA, kB, kIds, kOffsets, kScale, kA1, kB1, kTensors };
enum Number { kOut = kTensors, kIn, kThreads, kMatrix, kArguments };
using Arguments = PyObject* const*;
using Views = std::array<View, kTensors>;

bool given(const View& view) {
    return view.device == kCpu;
}

struct Sizes {
    Type type;
    bool packed;
    int64_t rows, stride, inner, outer, n, m, rank;  // stride: of the rows of x
};

bool in_panels(const View& v, Type type, int64_t outer, int64_t inner) {
    const int64_t count = (outer + 31) / 32;
    return type == kBf16 ? is(v, type, {count, (inner + 1) / 2, 32, 2}) : is(v, type, {count, inner, 32});
}

s3t_table table_of(const Views& t) {
    const View& ids = t[kIds];
    return {static_cast<const int32_t*>(ids.data),         ids.strides[0], ids.strides[1],
            static_cast<const int32_t*>(t[kOffsets].data), ids.shape[0],   ids.shape[1]};
}

// Tells whether a call is right by all that s3t_ext/lora/check.py asks, and by its values, and finds its sizes.
bool right(Arguments args, const Views& t, Sizes& z) {
    const View &x = t[kX], &weight = t[kWeight], &a = t[kA], &a1 = t[kA1], &ids = t[kIds];
    z.type = type_of(x);
    if (z.type > kBf16 || x.dims < 2 || x.dims > kMostDims) return false;
    z.inner = x.shape[x.dims - 1];
    const bool matrix = x.dims == 2;
    if (matrix ? z.inner > 1 && x.strides[1] != 1 : args[kMatrix] != Py_False || !contiguous(x)) return false;
    z.stride = matrix ? x.strides[0] : z.inner;
    z.rows = std::accumulate(x.shape, x.shape + x.dims - 1, int64_t{1}, std::multiplies<>());

    z.packed = args[kOut] != Py_None;
    if (!z.packed && weight.dims != 2) return false;
    z.outer = z.packed ? PyLong_AsLongLong(args[kOut]) : weight.shape[0];
    if (z.packed ? PyLong_AsLongLong(args[kIn]) != z.inner || !in_panels(weight, z.type, z.outer, z.inner)
                 : !is(weight, z.type, {z.outer, z.inner}))
        return false;
    if (given(t[kTurned]) && !in_panels(t[kTurned], z.type, z.inner, z.outer)) return false;
    if (given(t[kBias]) && !is(t[kBias], z.type, {z.outer})) return false;

    if (a.dims != 3 || (given(a1) && a1.dims != 3) || given(a1) != given(t[kB1])) return false;
    z.n = a.shape[0], z.m = given(a1) ? a1.shape[0] : 0, z.rank = a.shape[1];
    const auto pool = [&](const View& w, int64_t count, int64_t width) {
        return is(w, z.type, {count, z.rank, width}) || is(w, kF32, {count, z.rank, width});
    };
    if (!pool(a, z.n, z.inner) || !pool(t[kB], z.n, z.outer)) return false;
    if (given(a1) && !(pool(a1, z.m, z.inner) && pool(t[kB1], z.m, z.outer))) return false;
    if (given(t[kScale]) && !is(t[kScale], kF32, {z.n + z.m})) return false;

    if (ids.dims != 2 || type_of(ids) != kInt32) return false;
    if (given(t[kOffsets]) ? !is(t[kOffsets], kInt32, {ids.shape[0] + 1}) : ids.shape[0] != 1) return false;
    const s3t_table table = table_of(t);
    return fits({z.rows, table.slots, z.rank}) && fits({z.rows, z.outer}) &&
           s3t_check_values(&table, z.rows, z.n + z.m);
}

// Makes y (..., O) as torch makes it; null with an error set.
py::object make(PyObject* x, const View& shape, int64_t outer) {
    std::array<PyObject*, 1 + kMostDims> args{x};
    for (int d = 0; d < shape.dims; ++d) args[1 + d] = PyLong_FromLongLong(d + 1 < shape.dims ? shape.shape[d] : outer);
    PyObject* y = PyObject_Vectorcall(torch.new_empty, args.data(), 1 + shape.dims, nullptr);
    for (int d = 0; d < shape.dims; ++d) Py_XDECREF(args[1 + d]);
    return py::reinterpret_steal<py::object>(y);
}

PyObject* run(Arguments args, const Views& t, const Sizes& z, float scale) {
    int64_t threads = PyLong_AsLongLong(args[kThreads]);
    if (threads == 0) {
        const auto number = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(torch.threads));
        threads = number ? PyLong_AsLongLong(number.ptr()) : -1;
    }
    py::object y = PyErr_Occurred() == nullptr ? make(args[kX], t[kX], z.outer) : py::object();  // (T, O)
    View view;
    if (!y || !view_of(y.ptr(), view)) return nullptr;
    // s (T, P, r) is of no use to anybody afterwards: no tensor.
    const s3t_table table = table_of(t);
    const size_t bytes = static_cast<size_t>(z.rows * table.slots * z.rank) * (z.type == kF32 ? 4 : 2), line = 64;
    const std::unique_ptr<char[]> room(new (std::nothrow) char[bytes + line]);
    if (room == nullptr) return nullptr;
    void* s = room.get() + (line - reinterpret_cast<uintptr_t>(room.get()) % line);

    const auto code = [](Type type) { return static_cast<s3t_type>(type); };
    const auto pools = [&](const View& w, const View& w1, int64_t width) {
        return s3t_pools{
            w.data, w1.data, z.n, z.m, z.rank, width, code(type_of(w)), given(w1) ? code(type_of(w1)) : S3T_F32};
    };
    const s3t_matrix from{t[kX].data, z.stride, code(z.type)}, to{view.data, z.outer, code(z.type)};
    const s3t_pools a = pools(t[kA], t[kA1], z.inner), b = pools(t[kB], t[kB1], z.outer);
    const auto* scales = static_cast<const float*>(t[kScale].data);
    const void *weight = t[kWeight].data, *bias = t[kBias].data;
    const s3t_shrink_args down{z.rows, from, s, a, table, {}, scales, scale};
    const s3t_linear_args up{z.rows, z.inner, z.outer, from, to, weight, z.packed, false, bias, s, b, table, {}};
    int32_t status;
    {
        py::gil_scoped_release unlocked;
        status = s3t_layer(&down, &up, static_cast<int32_t>(threads));
    }
    return status == S3T_OK ? y.release().ptr() : nullptr;
}

// direct(x, weight or panels, turned, bias, a, b, adapter_ids, offsets, scale, a1, b1, out_features, in_features,
// threads, matrix) -> y or None. The two features are those of panels, else None; threads 0: as many as torch uses;
// matrix False: x may have any number of leading dimensions.
PyObject* direct(PyObject*, Arguments args, Py_ssize_t count) {
    constexpr auto may_lack = [](int i) { return i == kTurned || i == kBias || i == kOffsets || i == kA1 || i == kB1; };
    Views tensors{};
    Sizes sizes{};
    float scale = 1;
    bool declined = torch.view_of == nullptr || count != kArguments;
    const bool grad = !declined && holds(PyObject_CallNoArgs(torch.grad_enabled));
    for (int i = 0; i < kTensors && !declined; ++i) {
        if (i == kScale && (PyFloat_CheckExact(args[i]) || PyLong_CheckExact(args[i]))) {
            scale = static_cast<float>(PyFloat_AsDouble(args[i]));
        } else if (args[i] != Py_None || !may_lack(i)) {
            declined = !read(args[i], tensors[i]) || (grad && holds(PyObject_GetAttr(args[i], torch.requires_grad)));
        }
    }
    declined = declined || watched() || !right(args, tensors, sizes);
    PyObject* y = declined ? nullptr : run(args, tensors, sizes, scale);
    if (y != nullptr) return y;
    if (PyErr_Occurred() != nullptr && PyErr_ExceptionMatches(PyExc_Exception) == 0) return nullptr;  // an interrupt
    PyErr_Clear();
    Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {
    {"direct", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(direct)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// Takes what `direct` needs of torch. A torch that does not publish the C functions leaves it declining.
void attach(const py::type& tensor, const py::type& parameter, const py::tuple& watchers,
            const py::function& grad_enabled, const py::function& threads) {
    constexpr const char* kName = "dlpack_exchange_api";
    const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    if (PyCapsule_IsValid(capsule.ptr(), kName) == 0) return;
    const auto* api = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), kName));
    if (api->major != 1 || api->view_of == nullptr) return;
    const auto hold = [](py::object object) { return object.release().ptr(); };
    torch = {api->view_of,
             hold(tensor),
             hold(parameter),
             hold(watchers),
             hold(grad_enabled),
             hold(threads),
             hold(tensor.attr("is_neg")),
             hold(tensor.attr("new_empty")),
             PyUnicode_InternFromString("requires_grad")};
}

}  // namespace

void add_direct(py::module_& module) {
    module.def("attach", attach);
    if (PyModule_AddFunctions(module.ptr(), kMethods) != 0) throw py::error_already_set();
}
